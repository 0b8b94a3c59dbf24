"""Spans reach an exporter, and nothing needs OpenTelemetry."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_stages_of_a_request_are_spans_of_one_trace() -> None:
    """In a process of its own: the provider of a process is set once."""
    program = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
exporter = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))
from common.tracing import Stages, span
with span("request"):
    with span("cache.get", images=2):
        pass
    stages = Stages("prefill", prompt_tokens=7)
    stages.next("decode")
    stages.end()
    stages.end()
spans = exporter.get_finished_spans()
print([one.name for one in spans], dict(spans[0].attributes), len({one.context.trace_id for one in spans}))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    names = "['fovea.cache.get', 'fovea.prefill', 'fovea.decode', 'fovea.request']"
    assert ran.stdout.strip() == f"{names} {{'images': 2}} 1"


def test_without_opentelemetry_spans_are_nothing() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None
from common.tracing import Stages, span
with span("request", images=1):
    stages = Stages("prefill")
    stages.next("decode")
    stages.end()
print("fine")
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "fine\n"
