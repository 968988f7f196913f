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
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._inner: list[float] = []  # of each open span: seconds spent in spans inside it

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            passed = self._clock() - start
            own = passed - self._inner.pop()
            if self._inner:
                self._inner[-1] += passed
            self._seconds[name] = self._seconds.get(name, 0.0) + own

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last `take`, in order of first use; starts anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds
