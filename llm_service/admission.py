"""Who asks, until when, and how much waits: requests are admitted by what they hold, not by their number alone."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Literal

from common import metrics
from common.errors import DeadlineExceededError, OverloadedError, UnavailableError
from llm_service.config import AdmissionConfig, ApiKey

Quantity = Literal["requests", "bytes", "prompt_tokens", "vision_tokens"]


_UNKNOWN_RETRY_S = 5.0  # before anything was given back
_MEMORY_S = 30.0  # how long the rate remembers
_Clock = Callable[[], float]


class Held:
    """One quantity that requests hold: how much of it now, and how fast it has been given back of late."""

    def __init__(self, limit: int | None, clock: _Clock = time.monotonic) -> None:
        self.limit = limit
        self.amount = 0
        self._clock = clock
        self._at = clock()
        self._given_back = 0.0  # decayed, as the time in which it was
        self._busy_s = 0.0

    def take(self, amount: int, own: int = 0) -> float | None:
        """Takes it and returns None, or returns the seconds until there may be room.

        What alone exceeds the limit is let in when nothing is held but the caller's `own`: it would have to wait for
        ever.
        """
        self._pass_time()
        if self.limit is not None and self.amount > own and self.amount + amount > self.limit:
            return self._seconds_until_free(self.amount + amount - self.limit)
        self.amount += amount
        return None

    def give_back(self, amount: int) -> None:
        self._pass_time()
        self.amount -= amount
        self._given_back += amount

    def _seconds_until_free(self, amount: int) -> float:
        if not self._given_back or not self._busy_s:
            return _UNKNOWN_RETRY_S
        return amount * self._busy_s / self._given_back

    def _pass_time(self) -> None:
        now = self._clock()
        elapsed, self._at = now - self._at, now
        decay = math.exp(-elapsed / _MEMORY_S)
        self._given_back *= decay
        self._busy_s = self._busy_s * decay + (elapsed if self.amount else 0.0)


class RequestRate:
    """At most so many requests in any minute, begun evenly or in one burst (a token bucket)."""

    def __init__(self, per_minute: int, clock: _Clock = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._allowance = float(per_minute)
        self._at = clock()

    def take(self) -> float | None:
        """Takes one and returns None, or returns the seconds until there is one."""
        now = self._clock()
        self._allowance = min(self._per_minute, self._allowance + (now - self._at) * self._per_minute / 60)
        self._at = now
        if self._allowance < 1:
            return (1 - self._allowance) * 60 / self._per_minute
        self._allowance -= 1
        return None


class RequestContext:
    """Whose a request is, until when it is waited for (Unix time), and what it holds. Leaving gives everything back.

    `arrived_at` is of `time.perf_counter()`.
    """

    def __init__(
        self,
        tenant: str = "",
        deadline: float | None = None,
        *,
        key: ApiKey | None = None,
        admission: "Admission | None" = None,
        arrived_at: float | None = None,
    ) -> None:
        self.arrived_at = arrived_at
        self.tenant = tenant
        self.deadline = deadline
        self.key = key
        self._admission = admission
        self._held: dict[Quantity, int] = {}

    def hold(self, quantity: Quantity, amount: int) -> None:
        """Raises UnavailableError when the service holds too much of it already."""
        if self._admission is not None:
            own = self._held.get(quantity, 0)
            self._admission.take(quantity, amount, own)
            self._held[quantity] = own + amount

    def release(self, quantity: Quantity, amount: int | None = None) -> None:
        """Gives back so much of what is held, or all of it; that more than once is as good as once."""
        own = self._held.get(quantity, 0)
        if amount is None:
            amount = own
        if self._admission is not None and amount:
            self._held[quantity] = own - amount
            self._admission.held[quantity].give_back(amount)

    def __enter__(self) -> "RequestContext":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for quantity in list(self._held):
            self.release(quantity)
        if self._admission is not None:
            self._admission.leave(self.key)

    def limit(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Ends what is awaited inside with DeadlineExceededError when the time is over."""
        return contextlib.nullcontext() if self.deadline is None else self._limit(self.deadline)

    @contextlib.asynccontextmanager
    async def _limit(self, deadline: float) -> AsyncIterator[None]:
        left_s = max(0.0, deadline - time.time())
        try:
            async with asyncio.timeout(left_s) as timeout:
                yield
        except TimeoutError as exc:
            if not timeout.expired():
                raise
            raise DeadlineExceededError("the time limit of the request is over", code="deadline_exceeded") from exc


ANYONE = RequestContext()  # no tenant, no time limit, nothing counted


class Admission:
    """What this replica's requests hold together, and each key's own limits. One event loop."""

    def __init__(self, config: AdmissionConfig, keys: tuple[ApiKey, ...] = (), clock: _Clock = time.monotonic) -> None:
        self.held: dict[Quantity, Held] = {
            "requests": Held(config.max_requests, clock),
            "bytes": Held(config.max_held_bytes, clock),
            "prompt_tokens": Held(config.max_queued_prompt_tokens, clock),
            "vision_tokens": Held(config.max_queued_vision_tokens, clock),
        }
        self._concurrency = {key.name: Held(key.max_concurrent_requests, clock) for key in keys}
        self._rates = {
            key.name: RequestRate(key.max_requests_per_minute, clock)
            for key in keys
            if key.max_requests_per_minute is not None
        }

    def enter(self, key: ApiKey | None, deadline: float | None = None) -> RequestContext:
        """Raises OverloadedError for a key that has reached its own limit, UnavailableError when the service has."""
        if key is not None:
            self._enter_key(key)
        tenant = "" if key is None else key.tenant
        context = RequestContext(tenant, deadline, key=key, admission=self, arrived_at=time.perf_counter())
        try:
            context.hold("requests", 1)
        except UnavailableError:
            self.leave(key)
            raise
        return context

    def take(self, quantity: Quantity, amount: int, own: int = 0) -> None:
        """`own` is what the caller holds of it already."""
        held = self.held[quantity]
        wait_s = held.take(amount, own)
        if wait_s is not None:
            metrics.admission_rejections.inc(tags={"reason": quantity})
            name = quantity.replace("_", " ")
            raise UnavailableError(
                f"{held.amount} {name} are held by requests, {amount} more would exceed the limit of {held.limit} "
                f"(api.admission)",
                code="overloaded",
                retry_after_s=wait_s,
            )

    def leave(self, key: ApiKey | None) -> None:
        if key is not None:
            self._concurrency[key.name].give_back(1)

    def _enter_key(self, key: ApiKey) -> None:
        rate = self._rates.get(key.name)
        wait_s = None if rate is None else rate.take()
        if wait_s is not None:
            metrics.admission_rejections.inc(tags={"reason": "key_rate"})
            raise OverloadedError(
                f"the key {key.name!r} may make {key.max_requests_per_minute} requests a minute",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
        wait_s = self._concurrency[key.name].take(1)
        if wait_s is not None:
            metrics.admission_rejections.inc(tags={"reason": "key_concurrency"})
            raise OverloadedError(
                f"the key {key.name!r} may have {key.max_concurrent_requests} requests running at once",
                code="concurrency_limit_exceeded",
                retry_after_s=wait_s,
            )
