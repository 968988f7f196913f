from __future__ import annotations

import contextlib
import io
import os
import pty
import sys
from typing import Any

import pytest

from kinema.telemetry.progress import Progress, format_duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(total: int | None, seconds_each: float, n: int, **options: Any) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with Progress(
        "indexing", total=total, unit="file", stream=stream, clock=clock, **options
    ) as bar:
        for i in range(n):
            clock.now += seconds_each
            bar.advance(note=f"f{i}.mp4")
    return stream.getvalue().splitlines()


def test_lines_come_at_most_every_five_seconds_and_one_at_the_end() -> None:
    lines = run(total=79, seconds_each=0.125, n=79)
    assert lines == [
        "indexing: 40/79 files, 8 files/s, 4.9 s left  f39.mp4",
        "indexing: 79/79 files in 9.9 s, 8 files/s",
    ]


def test_a_long_job_writes_a_line_a_minute() -> None:
    lines = run(total=7200, seconds_each=1.0, n=7200)  # two hours
    assert 100 < len(lines) < 160
    assert lines[0].startswith("indexing: 5/7,200 files")
    counts = [int(line.split()[1].split("/")[0].replace(",", "")) for line in lines[:-1]]
    assert counts[-1] - counts[-2] == 60


def test_unknown_total_shows_no_time_left() -> None:
    lines = run(total=None, seconds_each=6.0, n=2)
    assert lines[0].startswith("indexing: 1 file, ")
    assert "left" not in lines[0]
    assert lines[-1].startswith("indexing: 2 files in 12 s")


def test_a_short_job_writes_one_line() -> None:
    assert run(total=3, seconds_each=0.01, n=3) == ["indexing: 3/3 files in 0.0 s, 100 files/s"]


def test_nothing_to_do() -> None:
    assert run(total=0, seconds_each=0.0, n=0) == ["indexing: 0/0 files in 0.0 s"]


def test_items_of_an_earlier_run_do_not_count_for_the_rate() -> None:
    lines = run(total=100, seconds_each=6.0, n=2, done=90)
    assert lines[0].startswith("indexing: 91/100 files, 0.167 files/s, 54 s left")


def test_rate_is_the_recent_one() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("training", total=1000, unit="step", stream=stream, clock=clock) as bar:
        for _ in range(10):  # ten slow first steps
            clock.now += 60.0
            bar.advance()
        for _ in range(100):
            clock.now += 1.0
            bar.advance()
    assert ", 1 steps/s" in stream.getvalue().splitlines()[-2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_passes_through_and_the_last_line_says_where(
    error: type[BaseException],
) -> None:
    stream = io.StringIO()

    def job() -> None:
        with Progress("checking", total=9, unit="file", stream=stream) as bar:
            bar.advance(4)
            raise error

    with pytest.raises(error):
        job()
    assert stream.getvalue().splitlines()[-1].startswith("checking: stopped at 4/9 files after")
    assert error.__name__ in stream.getvalue()


def test_a_terminal_that_goes_away_does_not_stop_the_job() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("checking", total=3, stream=stream, clock=clock) as bar:
        stream.close()
        for _ in range(3):
            clock.now += 10
            bar.advance()
    assert bar.done == 3


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("checking", total=1) as bar:
        bar.advance()
    assert bar.done == 1


def read_all(terminal: int) -> str:
    """What was written to a pseudo-terminal whose other end is closed; it comes in pieces."""
    pieces = []
    with contextlib.suppress(OSError):  # how its end is told
        while piece := os.read(terminal, 1 << 16):
            pieces.append(piece)
    os.close(terminal)
    return b"".join(pieces).decode()


def test_bar_on_a_terminal_and_lines_of_a_second_one() -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as stream:
        clock = Clock()
        with Progress("outer [x]", total=2, stream=stream, clock=clock) as outer:
            clock.now += 1
            outer.advance(note="a [bold] name.mp4")  # no markup in file names
            with Progress("inner", total=1, stream=stream, clock=clock) as inner:
                clock.now += 6
                inner.advance()
            outer.advance()
    text = read_all(reader)
    assert "outer [x]" in text
    assert "a [bold] name.mp4" in text
    assert "inner: 1/1 item" in text
    assert "outer [x]: 2/2 items in 7.0 s" in text
    assert not Progress._bar_on_screen


def test_rich_is_not_imported_without_a_terminal() -> None:
    code = (
        "import sys\n"
        "from kinema.telemetry.progress import Progress\n"
        "with Progress('x', total=1) as bar: bar.advance()\n"
        "assert 'rich' not in sys.modules\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == done.stderr.strip() + "\n"
    assert done.stderr.startswith("x: 1/1 item in ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (4 * 86400 + 6 * 3600, "4 d 6 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
