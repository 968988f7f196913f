"""When the next request may go out, whether there is money for it, and when to stop asking.

One of each for all threads of the one worker that asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kinema.curation.captions.cost import price_of
from kinema.curation.config import CaptionConfig

START_AFTER = 3
"""Clips in a row after which an endpoint that never answered one counts as dead."""


class Pace:
    """Requests evenly spread over the minute, and none while the endpoint wants to be left alone.

    Args:
        per_minute: None: as fast as they come.
        sleep: waits for so many seconds, or less (it is asked again).
    """

    def __init__(
        self,
        per_minute: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._every = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = self._quiet_until = float("-inf")

    def wait(self, stopped: Callable[[], bool]) -> None:
        """Return when a request may go out; at once when `stopped`."""
        while not stopped():
            with self._lock:
                now = self._clock()
                at = max(self._next, self._quiet_until)
                if at <= now:
                    self._next = now + self._every
                    return
            self._sleep(at - now)

    def leave_alone(self, seconds: float) -> None:
        """No request of any thread goes out for so long."""
        with self._lock:
            self._quiet_until = max(self._quiet_until, self._clock() + seconds)


class Budget:
    """`max_cost`: what was spent, and what requests on their way may spend."""

    def __init__(self, config: CaptionConfig) -> None:
        self._config = config
        self._settled = threading.Condition()
        self._spent = 0.0
        self._out: list[float] = []

    def reserve(self, tokens_in: int, tokens_out: int) -> bool:
        """Whether there is money for a request of that size; it is held back then. Where that
        hangs on what others on their way really use, it waits for them."""
        price = price_of(tokens_in, tokens_out, self._config)
        most = self._config.max_cost
        if price is None or most is None:
            return True
        with self._settled:
            while self._spent + sum(self._out) + price > most:
                if not self._out:
                    return False
                self._settled.wait()
            self._out.append(price)
            return True

    def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """A request is over: what was held back for it, and what it used, as (in, out) tokens."""
        if self._config.max_cost is None:
            return
        with self._settled:
            self._out.remove(price_of(*reserved, self._config) or 0.0)
            self._spent += price_of(*used, self._config) or 0.0
            self._settled.notify_all()

    def __str__(self) -> str:
        return f"{self._spent:.4g}"


class Stop:
    """When asking is of no use any more: why, once and for all."""

    def __init__(self, config: CaptionConfig) -> None:
        self._limit = config.give_up_after
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._failed = 0
        self._answered = False
        self.why = ""

    @property
    def stopped(self) -> bool:
        return self._event.is_set()

    @property
    def works(self) -> bool:
        """Whether there was a caption yet."""
        return self._answered

    def sleep(self, seconds: float) -> None:
        """At most so long; not longer than until it stops."""
        self._event.wait(seconds)

    def now(self, why: str) -> None:
        with self._lock:
            self.why = self.why or why
            self._event.set()

    def answered(self) -> None:
        """A clip has a caption: the endpoint works."""
        with self._lock:
            self._failed, self._answered = 0, True

    def failed(self, why: str, *, useless: bool = False) -> None:
        """No caption for a clip after all retries.

        Args:
            useless: there was an answer, and it was no caption: that may be the clip's fault, so
                it takes more of them until an endpoint that never gave one counts as dead.
        """
        with self._lock:
            self._failed += 1
            patient = self._answered or useless
            limit = self._limit if patient else min(self._limit, START_AFTER)
            if self._failed < limit:
                return
        times = f", {limit} clips in a row" if limit > 1 else ""
        self.now(f"{why}{times}")
