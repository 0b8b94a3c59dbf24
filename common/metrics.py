"""Every counter, gauge and histogram, named in one place.

Ray's agent exports them as `ray_<name>`; without a cluster they count all the same. `snapshot()` reads this process's
values, for `/health` and for tests; `exposition()` writes them as Prometheus reads them. Where vLLM measures the same,
the name is vLLM's with `fovea_` in the place of `vllm:`.
"""

import bisect
import itertools
import threading
from collections.abc import Iterator

from ray.util import metrics as ray_metrics

Tags = dict[str, str] | None
Series = tuple[tuple[str, str], ...]

_metrics: "list[Counter | Gauge | Histogram]" = []


class Counter:
    """A Ray counter that can be read in process. May be used from any thread."""

    kind = "counter"

    def __init__(self, name: str, description: str, *tag_keys: str) -> None:
        self.name = name
        self.description = description
        self._exported = ray_metrics.Counter(name, description, tag_keys=tag_keys)
        self._lock = threading.Lock()
        # Without tags there is one series, and it starts at 0.
        self._values: dict[Series, float] = {} if tag_keys else {(): 0.0}
        _metrics.append(self)

    def inc(self, amount: float = 1.0, tags: Tags = None) -> None:
        if not amount:  # Ray refuses to add nothing
            return
        self._exported.inc(amount, tags)
        series = _series(tags)
        with self._lock:
            self._values[series] = self._values.get(series, 0.0) + amount

    def read(self) -> dict[str, float]:
        with self._lock:
            return {self.name + _labels(series): value for series, value in self._values.items()}

    lines = read


class Gauge:
    """A Ray gauge that can be read in process. May be used from any thread."""

    kind = "gauge"

    def __init__(self, name: str, description: str, *tag_keys: str) -> None:
        self.name = name
        self.description = description
        self._exported = ray_metrics.Gauge(name, description, tag_keys=tag_keys)
        self._values: dict[Series, float] = {}
        _metrics.append(self)

    def set(self, value: float, tags: Tags = None) -> None:
        self._exported.set(value, tags)
        self._values[_series(tags)] = value

    def repeat(self) -> None:
        """Ray's agent forgets a gauge that is not set for a while."""
        for series, value in self._values.copy().items():
            self._exported.set(value, dict(series))

    def read(self) -> dict[str, float]:
        return {self.name + _labels(series): value for series, value in self._values.copy().items()}

    lines = read


class Histogram:
    """A Ray histogram that can be read in process. May be used from any thread."""

    kind = "histogram"

    def __init__(self, name: str, description: str, boundaries: list[float], *tag_keys: str) -> None:
        self.name = name
        self.description = description
        self._exported = ray_metrics.Histogram(name, description, boundaries=boundaries, tag_keys=tag_keys)
        self._boundaries = boundaries
        self._lock = threading.Lock()
        self._values: dict[Series, _Buckets] = {} if tag_keys else {(): _Buckets(boundaries)}
        _metrics.append(self)

    def observe(self, value: float, tags: Tags = None) -> None:
        self._exported.observe(value, tags)
        series = _series(tags)
        with self._lock:
            if series not in self._values:
                self._values[series] = _Buckets(self._boundaries)
            self._values[series].add(value)

    def read(self) -> dict[str, float]:
        """Counts and sums."""
        with self._lock:
            return {
                f"{self.name}_{part}{_labels(series)}": value
                for series, buckets in self._values.items()
                for part, value in (("count", buckets.count), ("sum", buckets.sum))
            }

    def lines(self) -> dict[str, float]:
        """Counts, sums and cumulative buckets."""
        with self._lock:
            cumulative = {
                f"{self.name}_bucket{_labels((*series, ('le', bound)))}": float(count)
                for series, buckets in self._values.items()
                for bound, count in buckets.cumulative()
            }
        return cumulative | self.read()


class _Buckets:
    """One series of a histogram."""

    def __init__(self, boundaries: list[float]) -> None:
        self._boundaries = boundaries
        self._counts = [0] * (len(boundaries) + 1)
        self.sum = 0.0

    @property
    def count(self) -> float:
        return float(sum(self._counts))

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._boundaries, value)] += 1
        self.sum += value

    def cumulative(self) -> Iterator[tuple[str, int]]:
        """Each upper bound with the number of values up to it."""
        return zip((*map(str, self._boundaries), "+Inf"), itertools.accumulate(self._counts), strict=True)


def snapshot() -> dict[str, float]:
    """This process's values by name, as in `fovea_requests_total{status="200"}`; of histograms counts and sums."""
    return {name: value for metric in _metrics for name, value in metric.read().items()}


def repeat_gauges() -> None:
    """To be called every few seconds, so that gauges of an idle process stay visible."""
    for metric in _metrics:
        if isinstance(metric, Gauge):
            metric.repeat()


def exposition() -> str:
    """This process's values in Prometheus's text format."""
    lines = []
    for metric in _metrics:
        lines += [f"# HELP {metric.name} {metric.description}", f"# TYPE {metric.name} {metric.kind}"]
        lines += [f"{name} {value:.12g}" for name, value in metric.lines().items()]
    return "\n".join(lines) + "\n"


def names() -> list[str]:
    """Of all metrics, without the suffixes of histograms."""
    return [metric.name for metric in _metrics]


def _series(tags: Tags) -> Series:
    return tuple(sorted(tags.items())) if tags else ()


def _labels(series: Series) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in series) + "}" if series else ""


_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
_LONG = [*_SECONDS, 60.0, 120.0]
_TOKENS = [1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0]

cache_hits = Counter("fovea_embedding_cache_hits_total", "embeddings found in a cache tier", "tier")
cache_misses = Counter("fovea_embedding_cache_misses_total", "embeddings found in no tier")
cache_rejected = Counter("fovea_embedding_cache_rejected_total", "entries that were not what they should be", "reason")
cache_quarantines = Counter(
    "fovea_embedding_namespaces_quarantined_total", "namespaces of which an audit found a wrong embedding"
)
images = Counter("fovea_images_total", "images of requests, by where their embedding came from", "source", "tenant")
encoder_seconds_saved = Counter(
    "fovea_encoder_seconds_saved_total", "what encoding the images that were found would have taken", "source", "tenant"
)
audits = Counter("fovea_audits_total", "embeddings that were found and encoded again to compare", "result")
answer_cache_hits = Counter("fovea_answer_cache_hits_total", "requests that were answered from the answer cache")
answer_cache_misses = Counter(
    "fovea_answer_cache_misses_total", "repeatable requests that were not in the answer cache"
)
redis_errors = Counter("fovea_redis_errors_total", "Redis calls that failed or ran past their time limit", "operation")
redis_skipped_reads = Counter("fovea_redis_skipped_reads_total", "reads that would not have paid, by why", "reason")
redis_dropped_writes = Counter("fovea_redis_dropped_writes_total", "entries that were given up before Redis had them")
media_store_errors = Counter(
    "fovea_media_store_errors_total", "calls of the second store that failed, and damaged entries", "operation"
)
aliases_unchecked = Counter(
    "fovea_aliases_unchecked_total", "images whose uuid could not be checked; it was not used, they were answered"
)
pixel_alias_hits = Counter(
    "fovea_pixel_alias_hits_total", "images answered with the embedding of a copy in another file"
)
pixel_aliases_unused = Counter(
    "fovea_pixel_aliases_unused_total", "images whose copies were not looked for: the media store could not do it"
)
images_encoded = Counter("fovea_images_encoded_total", "images that went through the vision encoder")
encode_seconds = Histogram("fovea_encode_seconds", "from the bytes of an image to its packed embedding", _SECONDS)
encoder_backlog_seconds = Gauge(
    "fovea_encoder_backlog_seconds", "what an encoder replica will take for the images it holds, as predicted"
)
requests = Counter("fovea_requests_total", "answered requests", "status")
admission_rejections = Counter(
    "fovea_admission_rejections_total", "requests that were refused for what is held or asked already", "reason"
)
client_disconnected = Counter(
    "fovea_http_requests_client_disconnected_total", "requests whose client left before the answer's end"
)
ignored_fields = Counter("fovea_ignored_fields_total", "unknown fields of requests, which are ignored")
streams_cut = Counter(
    "fovea_streams_cut_total", "streams that ended in an error event, or whose client left before their end"
)

num_requests_running = Gauge("fovea_num_requests_running", "requests in the batch of an engine")
num_requests_waiting = Gauge("fovea_num_requests_waiting", "requests that wait for a place in the batch")
kv_cache_usage = Gauge("fovea_kv_cache_usage_perc", "KV blocks that requests own; 1 is all")
num_preemptions = Counter("fovea_num_preemptions_total", "requests that lost their KV blocks to older ones")
prompt_tokens = Counter("fovea_prompt_tokens_total", "tokens of prompts, images included")
generation_tokens = Counter("fovea_generation_tokens_total", "tokens sampled by the decoder")
prefix_cache_queries = Counter(
    "fovea_prefix_cache_queries_total", "tokens of prompts that were looked for in KV blocks"
)
prefix_cache_hits = Counter("fovea_prefix_cache_hits_total", "tokens of prompts whose KV blocks were reused")
mm_cache_queries = Counter("fovea_mm_cache_queries_total", "images of requests whose embedding was looked for")
mm_cache_hits = Counter("fovea_mm_cache_hits_total", "images of requests whose embedding was found")
request_success = Counter("fovea_request_success_total", "requests that were generated to their end", "finished_reason")
request_prompt_tokens = Histogram("fovea_request_prompt_tokens", "tokens of one prompt", _TOKENS)
request_generation_tokens = Histogram("fovea_request_generation_tokens", "tokens of one answer", _TOKENS)
request_params_n = Histogram("fovea_request_params_n", "answers that one request asks for", [1.0, 2.0, 4.0, 8.0, 16.0])
request_params_max_tokens = Histogram("fovea_request_params_max_tokens", "tokens that an answer may have", _TOKENS)
iteration_tokens = Histogram("fovea_iteration_tokens_total", "tokens of one step of an engine", _TOKENS)
time_to_first_token_seconds = Histogram(
    "fovea_time_to_first_token_seconds", "from a request's arrival to its first token, embeddings included", _SECONDS
)
request_queue_time_seconds = Histogram(
    "fovea_request_queue_time_seconds", "from a request with its embeddings to its first step", _SECONDS
)
request_prefill_time_seconds = Histogram(
    "fovea_request_prefill_time_seconds", "from a request's first step to its first token", _SECONDS
)
request_decode_time_seconds = Histogram(
    "fovea_request_decode_time_seconds", "from the first to the last token of an answer", _LONG
)
request_inference_time_seconds = Histogram(
    "fovea_request_inference_time_seconds", "from a request's first step to the last token of an answer", _LONG
)
inter_token_latency_seconds = Histogram(
    "fovea_inter_token_latency_seconds", "between two tokens of an answer", [0.001, 0.002, *_SECONDS]
)
e2e_request_latency_seconds = Histogram(
    "fovea_e2e_request_latency_seconds",
    "from a request's arrival to the last token of an answer",
    _LONG,
)
embedding_wait_seconds = Histogram(
    "fovea_embedding_wait_seconds", "how long a request waited for an embedding", [0.001, 0.002, *_SECONDS], "source"
)
local_tier_bytes = Gauge("fovea_embedding_local_tier_bytes", "embeddings in this process")
