"""Draws, the log's window, what may change on resume, the message of a non-finite step."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kinema.config.errors import ConfigError
from kinema.config.recipe import load_recipe
from kinema.parallel.world import World
from kinema.training import nonfinite, run
from kinema.training.components import weights_seen_from
from kinema.training.config import TrainRecipe
from kinema.training.draws import Draws
from kinema.training.resume import MAY_CHANGE, MAY_CHANGE_WITH_NEW_POSITION, check_changes
from kinema.training.window import Window

CPU = torch.device("cpu")


def test_draws_depend_on_what_they_are_for_and_on_nothing_else() -> None:
    def number(purpose: str, seed: int = 1, epoch: int = 0, row: int = 5) -> float:
        generator = Draws(seed, epoch, row, CPU).generator(purpose)
        return float(torch.rand((), generator=generator))

    base = number("noise")
    torch.rand(100)  # the global state does not matter
    assert number("noise") == base
    others = [number("timestep"), number("noise", seed=2), number("noise", epoch=1)]
    assert len({base, *others, number("noise", row=6)}) == 5


def test_a_window_continues_after_a_resume() -> None:
    seen = {"loss/a": 3.0, "count/a": 2.0, "loss/b": 0.0, "count/b": 0.0, "part/kl": 4.0}
    seen |= {"samples": 7.0, "unreadable": 1.0, "stop": 1.0}
    window = Window()
    window.add(seen, grad_norm=2.0)
    window = Window.from_state(json.loads(json.dumps(window.state())))
    window.add(seen | {"loss/b": 5.0, "count/b": 1.0, "loss/a": 1.0}, grad_norm=None)
    assert window.record() == {
        "loss": (3.0 + 1.0 + 5.0) / 5,
        "kl": 8.0 / 5,
        "grad_norm": 2.0,
        "loss/a": 1.0,
        "loss/b": 5.0,
        "unreadable": 2,
    }
    assert window.steps == 1


def test_keys_that_may_change_exist() -> None:
    recipe = load_recipe("tiny/world", TrainRecipe)
    for key in MAY_CHANGE + MAY_CHANGE_WITH_NEW_POSITION:
        value: object = recipe
        for part in key.split("."):
            value = getattr(value, part)


@pytest.mark.parametrize(
    ("override", "new_position", "allowed"),
    [
        ("optim.lr=1", False, True),
        ("optim.schedule.warmup_steps=3", False, True),
        ("tracking.wandb={project: p}", False, True),
        ("preview={every: 5, prompts: [a]}", False, True),
        ("data.num_workers=2", False, True),
        ("data.buckets.64x64.17=[1.0, 2]", False, False),
        ("data.buckets.64x64.17=[1.0, 2]", True, True),
        ("accumulation=2", False, True),
        ("ema_decay=0.5", False, False),
        ("model.depth=5", True, False),
        ("optim.weight_decay=0.5", True, False),
        ("precision=bf16", False, False),
    ],
)
def test_what_may_change_when_a_run_goes_on(
    override: str, new_position: bool, allowed: bool
) -> None:
    old = load_recipe("tiny/world", TrainRecipe)
    new = load_recipe("tiny/world", TrainRecipe, [override])
    if allowed:
        found = check_changes(old, new, new_position=new_position, where="run")
        assert found
        return
    with pytest.raises(ConfigError) as caught:
        check_changes(old, new, new_position=new_position, where="run")
    assert override.partition("=")[0].split(".17")[0] in str(caught.value)
    way_out = "--ckpt-path" if "model" in override or "optim" in override else "--"
    assert way_out in str(caught.value)


def test_a_non_finite_step_is_told_with_its_clips_and_crosses_processes(tmp_path: Path) -> None:
    bad = nonfinite.Offender(3, float("nan"), float("inf"), "480p", list(range(12)), ["a.mp4"] * 12)
    report = tmp_path / "nonfinite-step7.json"
    nonfinite.write_report(report, 7, [bad])
    assert json.loads(report.read_text())["ranks"][0]["rows"] == list(range(12))
    error = nonfinite.error(7, [bad], where="run", report=report)
    for text in ("step 7", "rank 3", "loss nan", "norm inf", "480p", "a.mp4", "4 more"):
        assert text in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_weights_are_named_relative_only_beside_the_run(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "001-world"
    beside = tmp_path / "outputs" / "000-vae" / "epoch0-global_step9"
    assert (run / "epoch" / weights_seen_from(run, beside)).resolve() == beside
    assert weights_seen_from(run, tmp_path / "elsewhere") == str(tmp_path / "elsewhere")


def test_ranks_wait_for_a_preview_where_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the next step, whose time has no preview in it."""
    seen: list[str] = []
    monkeypatch.setattr(World, "barrier", lambda _: seen.append("wait"))
    maker: Any = SimpleNamespace(make=lambda *_: seen.append("make"))
    state: Any = SimpleNamespace(step=1, average=lambda: {"w": torch.ones(2)})
    log: Any = SimpleNamespace()
    world = World(0, 1, CPU)
    run._preview(state, previewer=maker, world=world, run=tmp_path, log=log)
    run._preview(state, previewer=None, world=world, run=tmp_path, log=None)
    assert seen == ["make", "wait", "wait"]
