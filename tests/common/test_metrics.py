import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from common import metrics


def test_a_counter_is_read_by_name_and_tag(counted: Callable[[str], float]) -> None:
    metrics.requests.inc(tags={"status": "200"})
    metrics.requests.inc(2, tags={"status": "503"})
    metrics.images_encoded.inc(0)
    assert counted('fovea_requests_total{status="200"}') == 1
    assert counted('fovea_requests_total{status="503"}') == 2
    assert counted("fovea_images_encoded_total") == 0


def test_a_histogram_is_read_as_count_and_sum(counted: Callable[[str], float]) -> None:
    metrics.encode_seconds.observe(0.25)
    metrics.encode_seconds.observe(0.5)
    assert counted("fovea_encode_seconds_count") == 2
    assert counted("fovea_encode_seconds_sum") == 0.75


def test_exposition_is_what_prometheus_reads() -> None:
    metrics.requests.inc(tags={"status": "418"})
    metrics.kv_cache_usage.set(0.25)
    metrics.embedding_wait_seconds.observe(0.002, tags={"source": "test"})
    metrics.embedding_wait_seconds.observe(99.0, tags={"source": "test"})
    lines = metrics.exposition().splitlines()
    assert {"# TYPE fovea_requests_total counter", 'fovea_requests_total{status="418"} 1'} <= set(lines)
    assert {"# TYPE fovea_kv_cache_usage_perc gauge", "fovea_kv_cache_usage_perc 0.25"} <= set(lines)
    buckets = [line for line in lines if line.startswith('fovea_embedding_wait_seconds_bucket{source="test"')]
    counts = {line.partition('le="')[2].partition('"')[0]: line.split()[-1] for line in buckets}
    assert (counts["0.001"], counts["0.002"], counts["30.0"], counts["+Inf"]) == ("0", "1", "1", "2")
    assert 'fovea_embedding_wait_seconds_count{source="test"} 2' in lines


def test_names_that_dashboards_of_vllm_know_are_there() -> None:
    known = """
        num_requests_running num_requests_waiting kv_cache_usage_perc num_preemptions_total prompt_tokens_total
        generation_tokens_total prefix_cache_queries_total prefix_cache_hits_total mm_cache_queries_total
        mm_cache_hits_total request_success_total request_prompt_tokens request_generation_tokens
        time_to_first_token_seconds inter_token_latency_seconds e2e_request_latency_seconds
        request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds
        request_inference_time_seconds request_params_n request_params_max_tokens iteration_tokens_total
        admission_rejections_total http_requests_client_disconnected_total
    """
    assert {f"fovea_{name}" for name in known.split()} <= set(metrics.names())
    assert len(metrics.names()) == len(set(metrics.names()))


def test_metrics_need_no_cluster_and_start_no_thread() -> None:
    program = (
        "import threading; from common import metrics; metrics.cache_misses.inc(); metrics.encode_seconds.observe(1.0);"
        "print(metrics.snapshot()['fovea_embedding_cache_misses_total'], threading.active_count())"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert (ran.stdout.split(), ran.stderr) == (["1.0", "1"], "")
