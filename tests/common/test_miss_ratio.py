"""The sampled miss-ratio curve against an exact simulation of LRU."""

import itertools
import time
from collections import OrderedDict

import numpy as np
import pytest

from common.miss_ratio import MissRatioCurve

NUM_KEYS = 5000


def zipf_trace(num_lookups: int, alpha: float = 0.9, seed: int = 0) -> tuple[list[str], dict[str, int]]:
    """Keys in the order of their look-ups, a few of them asked for very often, and the size of each in bytes."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, NUM_KEYS + 1) ** alpha
    ranks = rng.choice(NUM_KEYS, num_lookups, p=weights / weights.sum())
    sizes = {str(rank): int(size) for rank, size in enumerate(rng.integers(50_000, 4_000_000, NUM_KEYS))}
    return [str(rank) for rank in ranks], sizes


def lru_miss_ratio(trace: list[str], sizes: dict[str, int], max_bytes: int) -> float:
    held: OrderedDict[str, int] = OrderedDict()
    num_bytes = num_misses = 0
    for key in trace:
        if key in held:
            held.move_to_end(key)
            continue
        num_misses += 1
        held[key] = sizes[key]
        num_bytes += sizes[key]
        while num_bytes > max_bytes:
            num_bytes -= held.popitem(last=False)[1]
    return num_misses / len(trace)


@pytest.mark.parametrize(("max_samples", "tolerance"), [(10_000, 0.01), (1000, 0.03)])
def test_curve_is_that_of_an_exact_lru(max_samples: int, tolerance: float) -> None:
    trace, sizes = zipf_trace(40_000)
    curve = MissRatioCurve(max_samples)
    for key in trace:
        curve.record(key, sizes[key])
    memories = [sum(sizes.values()) * percent // 100 for percent in (1, 2, 5, 10, 20, 40, 80)]
    exact = [lru_miss_ratio(trace, sizes, memory) for memory in memories]
    errors = np.abs(np.array(list(curve.miss_ratios(memories).values())) - exact)
    print(f"{max_samples} samples: mean error {errors.mean():.4f}, largest {errors.max():.4f}")
    assert errors.mean() < tolerance


def test_more_memory_never_misses_more() -> None:
    trace, sizes = zipf_trace(5_000)
    curve = MissRatioCurve(100)
    for key in trace:
        curve.record(key, sizes[key])
    ratios = list(curve.miss_ratios([2**shift for shift in range(45)]).values())
    assert all(more <= less + 1e-9 for less, more in itertools.pairwise(ratios))
    assert ratios[0] == pytest.approx(1.0, abs=0.15)


def test_nothing_seen_is_nothing_promised() -> None:
    assert MissRatioCurve().miss_ratios([1024]) == {1024: 1.0}


def test_a_lookup_costs_microseconds_and_memory_stays_bounded() -> None:
    trace, sizes = zipf_trace(20_000)
    curve = MissRatioCurve(1000)
    started = time.perf_counter()
    for key in trace:
        curve.record(key, sizes[key])
    print(f"{(time.perf_counter() - started) / len(trace) * 1e6:.1f} us a look-up")
    assert len(curve._slots) <= 1000
