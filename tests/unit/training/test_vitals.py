"""How long ranks wait for one another, as the loop goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kinema.config.recipe import load_recipe
from kinema.parallel.world import World
from kinema.telemetry.spans import Spans
from kinema.training.config import TrainRecipe
from kinema.training.vitals import Vitals


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What collectives were told to wait at most, in order."""
    told: list[float] = []
    monkeypatch.setattr(World, "wait_at_most", lambda self, seconds: told.append(seconds))
    return told


def vitals(*overrides: str) -> Vitals:
    recipe = load_recipe("tiny/smoke", TrainRecipe, list(overrides))
    world = World(0, 2, torch.device("cpu"))
    return Vitals(recipe, world, Spans(), heart=None, path=str)


def step(one: Vitals) -> None:
    one.begin(0)
    one.end()


WATCHED = "watchdog={timeout_s: 10, first_step_s: 100}"


def test_long_for_the_first_step_and_for_saves_short_for_the_rest(limits: list[float]) -> None:
    one = vitals(WATCHED)
    for _ in range(3):
        step(one)
    assert limits == [40.0]
    one.be_patient()
    one.be_patient()
    assert limits == [40.0, 100.0]
    step(one)
    assert limits == [40.0, 100.0, 40.0]


@pytest.mark.parametrize("overrides", [("watchdog=null",), (WATCHED, "compile=true")])
def test_never_short_where_nobody_watches_or_shapes_are_compiled(
    limits: list[float], overrides: tuple[str, ...]
) -> None:
    one: Any = vitals(*overrides)
    step(one)
    one.be_patient()
    step(one)
    assert limits == []


def test_phases_before_the_first_step_are_nobodys_work(limits: list[float]) -> None:
    one = vitals(WATCHED)
    with one._spans("forward"):
        pass
    one.begin(0)
    assert one._own_work()["forward"] == 0.0
