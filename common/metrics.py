"""Every counter and histogram, named in one place.

Ray's agent exports them as `ray_<name>`; without a cluster they count all the same. `snapshot()` reads this process's
values, for `/health` and for tests.
"""

import threading

from ray.util import metrics as ray_metrics

_metrics: "list[Counter | Histogram]" = []


class Counter:
    """A Ray counter that can be read in process. May be used from any thread."""

    def __init__(self, name: str, description: str, *tag_keys: str) -> None:
        self.name = name
        self._exported = ray_metrics.Counter(name, description, tag_keys=tag_keys)
        self._lock = threading.Lock()
        # Without tags there is one series, and it starts at 0.
        self._values: dict[tuple[tuple[str, str], ...], float] = {} if tag_keys else {(): 0.0}
        _metrics.append(self)

    def inc(self, amount: float = 1.0, tags: dict[str, str] | None = None) -> None:
        if not amount:  # Ray refuses to add nothing
            return
        self._exported.inc(amount, tags)
        series = tuple(sorted(tags.items())) if tags else ()
        with self._lock:
            self._values[series] = self._values.get(series, 0.0) + amount

    def read(self) -> dict[str, float]:
        with self._lock:
            return {self.name + _labels(series): value for series, value in self._values.items()}


class Histogram:
    """A Ray histogram that can be read in process: its count and its sum. May be used from any thread."""

    def __init__(self, name: str, description: str, boundaries: list[float]) -> None:
        self.name = name
        self._exported = ray_metrics.Histogram(name, description, boundaries=boundaries)
        self._lock = threading.Lock()
        self._count = self._sum = 0.0
        _metrics.append(self)

    def observe(self, value: float) -> None:
        self._exported.observe(value)
        with self._lock:
            self._count += 1
            self._sum += value

    def read(self) -> dict[str, float]:
        with self._lock:
            return {f"{self.name}_count": self._count, f"{self.name}_sum": self._sum}


def snapshot() -> dict[str, float]:
    """This process's values by name, as in `fovea_requests_total{status="200"}`."""
    return {name: value for metric in _metrics for name, value in metric.read().items()}


def _labels(series: tuple[tuple[str, str], ...]) -> str:
    return "{" + ",".join(f'{key}="{value}"' for key, value in series) + "}" if series else ""


_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]

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
requests = Counter("fovea_requests_total", "answered requests", "status")
ignored_fields = Counter("fovea_ignored_fields_total", "unknown fields of requests, which are ignored")
time_to_first_token_seconds = Histogram("fovea_time_to_first_token_seconds", "request to first token", _SECONDS)
generated_tokens = Counter("fovea_generated_tokens_total", "tokens sampled by the decoder")
