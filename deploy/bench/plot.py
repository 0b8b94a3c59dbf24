"""The plot of `fovea bench serving`. matplotlib is an extra: pip install 'fovea[plot]'."""

import importlib
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.client import ClientError


def check_installed() -> None:
    """Raises ClientError before a measurement whose plot could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ClientError("the plot needs matplotlib: pip install 'fovea[plot]'")


def serving(path: Path, rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """Throughput and goodput, and the percentiles of each time, over the loads."""
    figure_module = importlib.import_module("matplotlib.figure")  # without pyplot, which looks for a display
    figure = figure_module.Figure(figsize=(12, 7), layout="constrained")
    figure.suptitle(title)
    loads = [row for row in rows if row["requests"]]
    panels = figure.subplots(2, 3).flat
    rates = next(panels)
    _lines(rates, loads, {"req_s": "answered", "good_req_s": "good"}, "requests per second")
    rates.set_ylim(bottom=0)
    tokens = next(panels)
    _lines(tokens, loads, {"out_tok_s": "output"}, "tokens per second")
    tokens.set_ylim(bottom=0)
    for name, words in (("ttft", "first token"), ("itl", "between events"), ("e2e", "whole answer")):
        panel = next(panels)
        _lines(panel, loads, {f"{name}_p{percent}_ms": f"p{percent}" for percent in (50, 90, 99)}, f"{words}, ms")
    probes = next(panels)
    if any(row["probe_p50_ms"] is not None for row in rows):
        _lines(probes, rows, {f"probe_p{percent}_ms": f"p{percent}" for percent in (50, 90, 99)}, "text probes, ms")
    else:
        probes.set_axis_off()
    figure.savefig(path, dpi=110)
    print(f"plotted in {path}")


def _sweeps(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Closed loops, open loops and idle probes apart: a line from one to another would mean nothing."""
    return [list(part) for _, part in itertools.groupby(rows, key=lambda row: row["load"].split()[-1])]


def _lines(panel: Any, rows: Sequence[dict[str, Any]], fields: dict[str, str], label: str) -> None:
    for index, (name, legend) in enumerate(fields.items()):
        for part in _sweeps(rows):
            values = [float("nan") if row[name] is None else row[name] for row in part]
            label_once = legend if part[0] is rows[0] else None
            panel.plot([row["load"] for row in part], values, marker="o", color=f"C{index}", label=label_once)
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)
    panel.tick_params(axis="x", rotation=20)
    panel.legend()
