"""How far a long job is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

SECONDS_BETWEEN_LINES = 5.0
MOST_SECONDS_BETWEEN_LINES = 60.0
SHARE_BETWEEN_LINES = 0.1
"""Of the time that a job has taken: the longer it runs, the fewer lines, down to one a minute."""
SECONDS_BETWEEN_REDRAWS = 0.1
RATE_WINDOW_S = 30.0


class Progress:
    """Counts items of a job and shows count, rate, time left and a note on stderr.

    Nothing that goes wrong with the display stops the job, and an exception inside passes
    through: the last line then says where the job stopped.

    Args:
        what: what is being done: "indexing".
        total: number of items, or None where it is not known; may be set later (`bar.total = n`).
        unit: one item, singular: "file"; or "%" of a total of 100.
        done: items that an earlier run has done already; they do not count for the rate.
        stream: where to write; stderr by default. A bar is drawn only if it is a terminal.
        clock: monotonic seconds.
    """

    _bar_on_screen = False  # a terminal has room for one bar; a second Progress writes lines

    def __init__(
        self,
        what: str,
        *,
        total: int | None = None,
        unit: str = "item",
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = done
        self.note = ""
        self._first = done
        self._stream = stream
        self._clock = clock
        self._start = clock()
        self._rate = _Rate(self._start, done)
        self._shown = self._start
        self._display: _Display | None = None
        self._owns_screen = False

    def __enter__(self) -> Self:
        stream = self._stream if self._stream is not None else sys.stderr
        self._start = self._shown = self._clock()
        self._rate = _Rate(self._start, self.done)
        if stream is not None and not Progress._bar_on_screen and _is_terminal(stream):
            self._display = _Bar(stream, self.what)
            self._owns_screen = Progress._bar_on_screen = True
        elif stream is not None:
            self._display = _Lines(stream)
        return self

    @property
    def seconds(self) -> float:
        """Since the job began, up to what was shown last."""
        return self._shown - self._start

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more items; `note` (the file at hand, the loss) replaces the last note."""
        self.done += n
        if note:
            self.note = note
        now = self._clock()
        if self._display is None or now - self._shown < self._display.interval_s:
            return
        self._shown = now
        self._rate.add(now, self.done)
        self._guarded(lambda d: d.show(self, self._status(self._rate.per_second())))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = self._clock() - self._start
        mean = (self.done - self._first) / seconds if seconds > 0 else 0.0
        if kind is None:
            last = f"{self._count()} in {format_duration(seconds)}{self._pace(mean)}"
        else:
            last = f"stopped at {self._count()} after {format_duration(seconds)} ({kind.__name__})"
        self._guarded(lambda d: d.finish(f"{self.what}: {last}"))
        self._display = None
        if self._owns_screen:
            self._owns_screen = Progress._bar_on_screen = False

    def _guarded(self, draw: Callable[[_Display], None]) -> None:
        if self._display is None:
            return
        try:
            draw(self._display)
        except (OSError, ValueError):
            # The terminal went away (closed window, closed stream): go on without a display.
            self._display = None

    def _count(self) -> str:
        if self.total is None:
            return f"{self.done:,} {self._units(self.done)}"
        if self.unit == "%":
            return f"{self.done:,} %"
        return f"{self.done:,}/{self.total:,} {self._units(self.total)}"

    def _units(self, count: int) -> str:
        return self.unit if count == 1 else f"{self.unit}s"

    def _pace(self, per_second: float) -> str:
        if per_second <= 0 or self.unit == "%":
            return ""
        return f", {_number(per_second)} {self.unit}s/s"

    def _status(self, per_second: float) -> str:
        text = self._count() + self._pace(per_second)
        if self.total is not None and per_second > 0 and self.done < self.total:
            text += f", {format_duration((self.total - self.done) / per_second)} left"
        return f"{text}  {self.note}" if self.note else text


def format_duration(seconds: float) -> str:
    """`4.2 s`, `42 s`, `3 min 05 s`, `2 h 07 min`, `4 d 6 h`."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = minutes // 60
    return f"{hours // 24} d {hours % 24} h"


class _Display(Protocol):
    interval_s: float

    def show(self, progress: Progress, status: str) -> None: ...

    def finish(self, line: str) -> None: ...


class _Lines:
    """For files, pipes and CI logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.interval_s = SECONDS_BETWEEN_LINES

    def show(self, progress: Progress, status: str) -> None:
        self.finish(f"{progress.what}: {status}")
        self.interval_s = min(
            max(progress.seconds * SHARE_BETWEEN_LINES, SECONDS_BETWEEN_LINES),
            MOST_SECONDS_BETWEEN_LINES,
        )

    def finish(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class _Bar:
    """rich's bar; lines that others write to stderr meanwhile appear above it."""

    interval_s = SECONDS_BETWEEN_REDRAWS

    def __init__(self, stream: TextIO, what: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._stream = stream
        self._bar: Any = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[status]}", markup=False),
            console=Console(file=stream),
            transient=True,
        )
        self._task = self._bar.add_task(what, total=None, status="")
        self._bar.start()

    def show(self, progress: Progress, status: str) -> None:
        self._bar.update(
            self._task, completed=progress.done, total=progress.total, status=status, refresh=True
        )

    def finish(self, line: str) -> None:
        self._bar.stop()
        self._stream.write(line + "\n")
        self._stream.flush()


class _Rate:
    """Items per second over the last `RATE_WINDOW_S`."""

    def __init__(self, now: float, done: int) -> None:
        self._points = deque([(now, done)])

    def add(self, now: float, done: int) -> None:
        self._points.append((now, done))
        while len(self._points) > 2 and self._points[1][0] < now - RATE_WINDOW_S:
            self._points.popleft()

    def per_second(self) -> float:
        (start, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - start) if end > start else 0.0


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, OSError, ValueError):
        return False
