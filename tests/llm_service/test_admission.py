"""What requests hold, how fast it is given back, and when there will be room."""

import pytest

from common.errors import OverloadedError, UnavailableError
from llm_service.admission import Admission, Held, RequestRate
from llm_service.api.errors import MAX_RETRY_AFTER_S
from llm_service.config import AdmissionConfig, ApiKey


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_room_is_predicted_from_how_fast_it_came_back() -> None:
    clock = Clock()
    held = Held(100, clock)
    for _ in range(5):  # 50 a second
        assert held.take(100) is None
        clock.now += 2
        held.give_back(100)
    assert held.take(100) is None
    wait_s = held.take(50)
    assert wait_s is not None
    assert wait_s == pytest.approx(1.0, rel=0.1)


def test_idle_time_says_nothing_of_the_rate() -> None:
    clock = Clock()
    held = Held(100, clock)
    held.take(100)
    clock.now += 2
    held.give_back(100)
    clock.now += 5
    held.take(100)
    assert held.take(100) == pytest.approx(2.0, rel=0.1)


def test_what_alone_exceeds_the_limit_is_let_in_alone() -> None:
    held = Held(100)
    assert held.take(500) is None
    assert held.take(1) is not None


def test_rate_allows_a_burst_and_then_an_even_pace() -> None:
    clock = Clock()
    rate = RequestRate(60, clock)
    assert [rate.take() for _ in range(60)] == [None] * 60
    assert rate.take() == pytest.approx(1.0)
    clock.now += 1
    assert rate.take() is None
    assert rate.take() is not None


def test_leaving_gives_everything_back_and_a_refusal_takes_nothing() -> None:
    key = ApiKey(name="k", sha256="0" * 64, max_concurrent_requests=2)
    admission = Admission(AdmissionConfig(max_requests=1, max_queued_prompt_tokens=10), (key,))
    with admission.enter(key) as context:
        context.hold("prompt_tokens", 8)
        with pytest.raises(UnavailableError) as refused:
            admission.enter(key)
        assert refused.value.retry_after_s is not None
        assert 0 < refused.value.retry_after_s <= MAX_RETRY_AFTER_S
        context.release("prompt_tokens")
        context.release("prompt_tokens")
        assert admission.held["prompt_tokens"].amount == 0
    assert not any(held.amount for held in admission.held.values())
    with admission.enter(key):
        pass


def test_key_that_has_enough_running_is_told_so() -> None:
    key = ApiKey(name="k", sha256="0" * 64, max_concurrent_requests=1)
    admission = Admission(AdmissionConfig(), (key,))
    with admission.enter(key), pytest.raises(OverloadedError, match="'k' may have 1 requests"):
        admission.enter(key)
    with admission.enter(key):
        pass
