from __future__ import annotations

import itertools

import pytest

from kinema.training.config import OneCycleSchedule, WarmupSchedule
from kinema.training.schedule import learning_rate


def test_warm_up_is_linear_and_never_zero_then_constant() -> None:
    schedule = WarmupSchedule(warmup_steps=4)
    got = [learning_rate(schedule, 1.0, step) for step in range(7)]
    assert got == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_no_warm_up() -> None:
    assert learning_rate(WarmupSchedule(), 3e-4, 0) == 3e-4


@pytest.mark.parametrize("anneal", ["cosine", "linear"])
def test_one_cycle_rises_falls_and_stays(anneal: str) -> None:
    schedule = OneCycleSchedule(
        type="one-cycle",
        min_lr=0.1,
        max_lr=4.0,
        warmup_steps=10,
        cooldown_steps=20,
        anneal="cosine" if anneal == "cosine" else "linear",
    )
    got = [learning_rate(schedule, 1.0, step) for step in range(50)]
    assert got[0] == pytest.approx(0.1)
    assert got[5] == pytest.approx((0.1 + 4.0) / 2)
    assert got[10] == pytest.approx(4.0)
    assert got[20] == pytest.approx((4.0 + 1.0) / 2)
    assert got[30:] == pytest.approx([1.0] * 20)
    assert all(a < b for a, b in itertools.pairwise(got[:11]))
    assert all(a > b for a, b in itertools.pairwise(got[10:31]))


def test_linear_slopes_are_straight() -> None:
    schedule = OneCycleSchedule(
        type="one-cycle", min_lr=0.0, max_lr=4.0, warmup_steps=4, cooldown_steps=3, anneal="linear"
    )
    got = [learning_rate(schedule, 1.0, step) for step in range(9)]
    assert got == pytest.approx([0, 1, 2, 3, 4, 3, 2, 1, 1])
