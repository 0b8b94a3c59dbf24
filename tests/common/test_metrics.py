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


def test_metrics_need_no_cluster_and_start_no_thread() -> None:
    program = (
        "import threading; from common import metrics; metrics.cache_misses.inc(); metrics.encode_seconds.observe(1.0);"
        "print(metrics.snapshot()['fovea_embedding_cache_misses_total'], threading.active_count())"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert (ran.stdout.split(), ran.stderr) == (["1.0", "1"], "")
