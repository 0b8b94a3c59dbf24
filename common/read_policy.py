"""Whether asking a shared store pays: what a read has cost of late, beside what encoding would."""

import statistics
from collections import deque

_SMALL_BYTES = 64 * 1024  # up to here the fixed part decides
_NUM_SAMPLES = 15
_NUM_LOOKUPS = 64
_ASSUMED_HITS = 2  # so that a few misses prove nothing, and a store that seems empty is not given up for ever
_UNNOTICED_S = 0.0015  # a request for a new image asks three times, and nobody notices 5 ms


class TypicalSeconds:
    """Seconds as a function of bytes: a fixed part and a part for each byte, from the medians of the last samples.

    One stall in the middle changes nothing; a lasting change is believed when it makes half of the samples.
    """

    def __init__(self) -> None:
        self._fixed_s: deque[float] = deque(maxlen=_NUM_SAMPLES)
        self._s_per_byte: deque[float] = deque(maxlen=_NUM_SAMPLES)

    def record(self, num_bytes: int, seconds: float) -> None:
        if num_bytes <= _SMALL_BYTES:
            self._fixed_s.append(seconds)
        else:
            self._s_per_byte.append(max(seconds - _median(self._fixed_s), 0.0) / num_bytes)

    def predict(self, num_bytes: int) -> float | None:
        """None until there is a sample."""
        if not self._fixed_s and not self._s_per_byte:
            return None
        return _median(self._fixed_s) + _median(self._s_per_byte) * num_bytes


class ReadPolicy:
    """A read pays if it costs less, on average, than the encoding that its hits save.

    Without hits there is nothing to save, so a store that is slow and has nothing is left alone; one whose answers
    nobody notices never is.
    """

    def __init__(self) -> None:
        self._read_s = TypicalSeconds()
        self._encode_s = TypicalSeconds()
        self._was_hit: deque[bool] = deque(maxlen=_NUM_LOOKUPS)

    def record_hit(self, num_bytes: int, seconds: float) -> None:
        self._was_hit.append(True)
        self._read_s.record(num_bytes, seconds)

    def record_miss(self, seconds: float) -> None:
        self._was_hit.append(False)
        self._read_s.record(0, seconds)

    def record_timeout(self, num_bytes: int, seconds: float) -> None:
        self._read_s.record(num_bytes, seconds)

    def record_encode(self, num_bytes: int, seconds: float) -> None:
        self._encode_s.record(num_bytes, seconds)

    def pays(self, num_bytes: int) -> bool:
        """Whether to read an entry of about `num_bytes`. Yes, until both costs are known."""
        encode_s = self._encode_s.predict(num_bytes)
        hit_s, miss_s = self._read_s.predict(num_bytes), self._read_s.predict(0)
        if encode_s is None or hit_s is None or miss_s is None:
            return True
        hit_rate = (sum(self._was_hit) + _ASSUMED_HITS) / (len(self._was_hit) + _ASSUMED_HITS)
        return hit_rate * hit_s + (1 - hit_rate) * miss_s <= max(_UNNOTICED_S, hit_rate * encode_s)


def _median(samples: deque[float]) -> float:
    return statistics.median(samples) if samples else 0.0
