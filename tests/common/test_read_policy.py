import pytest

from common.config import MIB
from common.read_policy import ReadPolicy, TypicalSeconds


@pytest.fixture
def policy() -> ReadPolicy:
    """Of a store that encoding 4 MiB in 30 ms stands behind."""
    policy = ReadPolicy()
    policy.record_encode(4 * MIB, 0.030)
    return policy


def test_nothing_is_predicted_without_a_sample() -> None:
    assert TypicalSeconds().predict(MIB) is None


def test_seconds_are_a_fixed_part_and_a_part_for_each_byte() -> None:
    typical = TypicalSeconds()
    typical.record(0, 0.001)
    typical.record(4 * MIB, 0.005)
    assert typical.predict(0) == pytest.approx(0.001)
    assert typical.predict(8 * MIB) == pytest.approx(0.009)


def test_one_stall_changes_nothing_and_a_lasting_change_is_believed() -> None:
    typical = TypicalSeconds()
    for seconds in [0.001] * 10 + [1.0]:
        typical.record(0, seconds)
    assert typical.predict(0) == 0.001
    for _ in range(10):
        typical.record(0, 1.0)
    assert typical.predict(0) == 1.0


def test_reads_pay_until_both_costs_are_known() -> None:
    policy = ReadPolicy()
    policy.record_hit(4 * MIB, 10.0)
    assert policy.pays(4 * MIB)


def test_a_store_that_is_slower_than_encoding_is_not_read(policy: ReadPolicy) -> None:
    policy.record_hit(4 * MIB, 0.020)
    assert policy.pays(4 * MIB)
    for _ in range(3):
        policy.record_hit(4 * MIB, 0.050)
    assert not policy.pays(4 * MIB)


def test_a_store_that_times_out_is_not_read(policy: ReadPolicy) -> None:
    policy.record_timeout(4 * MIB, 0.130)
    assert not policy.pays(4 * MIB)


def test_a_slow_store_that_has_nothing_is_not_read_and_one_that_has_much_is(policy: ReadPolicy) -> None:
    for _ in range(30):
        policy.record_miss(0.010)
    assert not policy.pays(4 * MIB)
    for _ in range(60):
        policy.record_hit(4 * MIB, 0.012)
    assert policy.pays(4 * MIB)


def test_a_store_whose_answers_nobody_notices_is_always_read(policy: ReadPolicy) -> None:
    for _ in range(1000):
        policy.record_miss(0.001)
    assert policy.pays(4 * MIB)


def test_a_store_that_has_become_fast_is_read_again(policy: ReadPolicy) -> None:
    for _ in range(15):
        policy.record_hit(4 * MIB, 0.500)
    assert not policy.pays(4 * MIB)
    for _ in range(8):
        policy.record_hit(4 * MIB, 0.004)
    assert policy.pays(4 * MIB)
