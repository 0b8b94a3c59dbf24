"""An online miss-ratio curve: how often a memory of any size would miss, from a small sample of the look-ups.

SHARDS with a fixed number of samples (Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015): keys
are sampled by their hash, so that every look-up of a sampled key is seen, and the bytes between two uses of one are
scaled by the sampling rate. The curve is that of LRU.
"""

from collections.abc import Sequence

import numpy as np
import xxhash

_HASHES = 1 << 24
_BUCKETS_PER_DOUBLING = 16
_NUM_BUCKETS = 50 * _BUCKETS_PER_DOUBLING


class MissRatioCurve:
    """Learns from each look-up in some microseconds, with memory for `max_samples` keys."""

    def __init__(self, max_samples: int = 4096) -> None:
        self._max_samples = max_samples
        self._threshold = _HASHES  # a key is sampled if its hash is below
        self._num_lookups = 0
        # Sampled keys in the order of their last use: `_sizes[slot]` bytes, 0 where the key was used again since.
        # A plain sum over the slots is a few microseconds, and no tree has to be balanced.
        self._slots: dict[str, int] = {}
        self._sizes = np.zeros(4 * max_samples)
        self._next_slot = 0
        self._reuses = np.zeros(_NUM_BUCKETS)  # by the bytes that LRU needs to still hold the key
        self._num_sampled = 0.0  # look-ups of sampled keys, at the present rate

    def record(self, key: str, num_bytes: int) -> None:
        """One look-up of an entry of this size, found or not."""
        self._num_lookups += 1
        if _hash(key) >= self._threshold:
            return
        self._num_sampled += 1
        last = self._slots.pop(key, None)
        if last is not None:
            others = self._sizes[last + 1 : self._next_slot].sum() * _HASHES / self._threshold
            self._reuses[_bucket(others + num_bytes)] += 1
            self._sizes[last] = 0
        if self._next_slot == len(self._sizes):
            self._compact()
        self._slots[key] = self._next_slot
        self._sizes[self._next_slot] = num_bytes
        self._next_slot += 1
        if len(self._slots) > self._max_samples:
            self._lower_threshold()

    def miss_ratios(self, sizes: Sequence[int]) -> dict[int, float]:
        """The share of look-ups that an LRU memory of each of these sizes, in bytes, would have missed."""
        # A key used very often is in the sample or not; what it makes the sample too large or too small is put to the
        # shortest distance (the paper's SHARDS-adj).
        expected = self._num_lookups * self._threshold / _HASHES
        if expected == 0:
            return dict.fromkeys(sizes, 1.0)
        surplus = expected - self._num_sampled
        hits = {size: self._reuses[: _bucket(size) + 1].sum() + surplus for size in sizes}
        return {size: min(1.0, max(0.0, 1 - float(count) / expected)) for size, count in hits.items()}

    def _compact(self) -> None:
        in_order = sorted(self._slots, key=self._slots.__getitem__)
        kept = self._sizes[[self._slots[key] for key in in_order]]
        self._sizes[:] = 0
        self._sizes[: len(kept)] = kept
        self._slots = {key: slot for slot, key in enumerate(in_order)}
        self._next_slot = len(kept)

    def _lower_threshold(self) -> None:
        """Forgets the eighth of the keys with the highest hashes; counts so far are scaled to the new rate."""
        threshold = sorted(map(_hash, self._slots))[self._max_samples * 7 // 8]
        for key in [key for key in self._slots if _hash(key) >= threshold]:
            self._sizes[self._slots.pop(key)] = 0
        scale = threshold / self._threshold
        self._reuses *= scale
        self._num_sampled *= scale
        self._threshold = threshold


def _hash(key: str) -> int:
    value: int = xxhash.xxh3_64_intdigest(key.encode())
    return value % _HASHES


def _bucket(num_bytes: float) -> int:
    """Sixteen buckets for each doubling, so that a size is right within 5 %."""
    return min(_NUM_BUCKETS - 1, int(np.log2(max(num_bytes, 1.0)) * _BUCKETS_PER_DOUBLING))
