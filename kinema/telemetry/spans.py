"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Spans:
    """Seconds per named phase::

        with spans("data"):
            batch = next(batches)
        ...
        record |= {f"{name}_s": s for name, s in spans.take().items()}

    A phase inside another counts for itself only, so the phases never sum to more than the time
    that passed. This is time on the host: work queued on a GPU is counted where the host waits.

    Attributes:
        on_enter: called with the name of each phase as it begins, with that of the phase around
            it when it ends, and with "" where there is none around it.
        total: seconds per phase since the beginning; `take` leaves them.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._inner: list[float] = []  # of each open span: seconds spent in spans inside it
        self.on_enter: Callable[[str], None] | None = None
        self.total: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.on_enter is not None:
            self.on_enter(name)
        start = self._clock()
        self._inner.append(0.0)
        self._open.append(name)
        try:
            yield
        finally:
            passed = self._clock() - start
            own = passed - self._inner.pop()
            self._open.pop()
            if self._inner:
                self._inner[-1] += passed
            self._seconds[name] = self._seconds.get(name, 0.0) + own
            self.total[name] = self.total.get(name, 0.0) + own
            if self.on_enter is not None:
                self.on_enter(self._open[-1] if self._open else "")

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last `take`, in order of first use; starts anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds
