from __future__ import annotations

import pytest

from kinema.telemetry.spans import Spans


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_seconds_add_up_per_phase_and_restart_when_taken() -> None:
    clock = Clock()
    spans = Spans(clock)
    for seconds in (1.0, 2.0):
        with spans("data"):
            clock.now += seconds
    with spans("forward"):
        clock.now += 4.0
    assert spans.take() == {"data": 3.0, "forward": 4.0}
    assert spans.take() == {}


def test_a_phase_inside_another_counts_for_itself_only() -> None:
    clock = Clock()
    spans = Spans(clock)
    with spans("step"):
        clock.now += 1.0
        with spans("encode"):
            clock.now += 5.0
            with spans("text"):
                clock.now += 2.0
        clock.now += 1.0
    assert spans.take() == {"text": 2.0, "encode": 5.0, "step": 2.0}


def test_an_exception_closes_the_phase() -> None:
    clock = Clock()
    spans = Spans(clock)

    def fails() -> None:
        with spans("a"), spans("b"):
            clock.now += 1.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    with spans("c"):
        clock.now += 1.0
    assert spans.take() == {"b": 1.0, "a": 0.0, "c": 1.0}
