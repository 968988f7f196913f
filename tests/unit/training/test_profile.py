"""The profiler around a run: which steps it records, and what is left in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.config.recipe import load_recipe
from kinema.parallel.world import World
from kinema.telemetry.run_log import RunLog
from kinema.telemetry.spans import Spans
from kinema.telemetry.trace import break_down, read_trace
from kinema.training.config import TrainRecipe
from kinema.training.profile import SKIPPED, WARMED, Profile, check_length, facts_of

WORLD = World(0, 1, torch.device("cpu"))


def recipe(*overrides: str) -> TrainRecipe:
    return load_recipe("tiny/smoke", TrainRecipe, list(overrides))


def test_steps_are_recorded_with_their_phases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spans, told = Spans(), list[str]()
    spans.on_enter = told.append
    weights = torch.ones(64, 64)
    with RunLog(tmp_path, tensorboard=False) as log:
        profile = Profile(recipe(), WORLD, 2, spans=spans, run=tmp_path, log=log)
        steps = 0
        with profile:
            over = False
            while not over:
                with spans("data"):
                    pass
                with spans("forward"):
                    for _ in range(20):
                        weights = torch.tanh(weights @ weights)
                steps += 1
                over = profile.stepped()
    assert steps == profile.needed == SKIPPED + WARMED + 2
    assert told == ["data", "", "forward", ""] * steps  # whoever listened before still does
    assert spans.on_enter == told.append
    found = break_down(read_trace(tmp_path / "profile" / "trace-rank0.json.gz"))
    assert found.steps == 2
    assert set(found.spans) == {"data", "forward"}
    assert "aten::mm" in found.operators
    assert found.rows["CPU"] > 0
    said = capsys.readouterr().err
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert table in said
    assert "what to try next:" in table
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == [
        "table.txt",
        "trace-rank0.json.gz",
    ]
    [event] = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(event)["event"] == "profiled"


def test_a_run_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        profile = Profile(recipe(), WORLD, 2, spans=Spans(), run=tmp_path, log=log)
        with pytest.raises(KinemaError, match="ended after 1 step"), profile:
            profile.stepped()
    assert not (tmp_path / "profile").exists()  # half a profile says nothing
    with pytest.raises(KinemaError, match="takes 6 steps") as refused:
        check_length(recipe("max_steps=5"), 2)
    assert refused.value.hint is not None
    assert "--max_steps 6" in refused.value.hint
    check_length(recipe("max_steps=6"), 2)
    check_length(recipe("max_steps=null"), 2)


def test_what_is_set_already_is_known() -> None:
    found = facts_of(
        recipe("recompute=full", "compile=true", "task.remember_latents=false",
               "parallel.shard=zero2", "parallel.shard_over=node", "data.num_workers=3"),
        World(0, 4, torch.device("cpu")),
    )  # fmt: skip
    assert (found.ranks, found.shard, found.hybrid, found.workers) == (4, "zero2", True, 3)
    assert (found.compile, found.recompute, found.latents_cached) == (True, "full", False)
    assert facts_of(recipe("task.remember_latents=true"), WORLD).latents_cached
