"""Saving against a full disk and against kill -9: what was there before stays loadable."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import resource
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.checkpoint.run import Checkpoint, clean_leftovers, prune, save_checkpoint
from kinema.config.errors import KinemaError

SIZE = 1_000_000
"""Numbers in the one weight tensor: 4 MB, so that a save takes a while."""


def start(function: Any, *args: Any) -> ForkServerProcess:
    """A process that is cheap to start (its parent has imported torch) and safe to kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=function, args=args)
    process.start()
    return process


def _save_too_large(run: Path, part: str, limit: int, said: Path) -> None:
    tensors: dict[str, Any] = {
        name: {"w": torch.zeros(10)} for name in ("model", "ema", "optimizer")
    }
    if part in tensors:
        tensors[part] = {f"w{i}": torch.zeros(100_000) for i in range(4)}
    recipe = "x" * (4 * limit if part == "recipe" else 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_checkpoint(run, 0, 2, **tensors, state={}, components={}, recipe=recipe)
    except KinemaError as error:
        said.write_text(str(error))
        sys.exit(3)


@pytest.mark.parametrize("part", ["model", "ema", "optimizer", "recipe"])
def test_a_full_disk_is_one_clear_error(part: str, tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    save_checkpoint(run, 0, 1, model={"w": torch.ones(10)}, state={}, components={})
    process = start(_save_too_large, run, part, 200_000, said)
    process.join()
    assert process.exitcode == 3
    named = {"model": "/model.safetensors", "ema": "/ema.safetensors", "optimizer": "/optimizer"}
    where = f"{run / 'epoch0-global_step2'}{named.get(part, '')}"
    assert said.read_text().startswith(f"{where}: could not be written: a quota or a limit on ")
    assert re.search(r"needs 1\.6 MB|recipe", said.read_text() + part)
    assert re.search(r" MB, [\d.]+ [GM]B free\)", said.read_text())
    assert os.listdir(run) == ["epoch0-global_step1"]
    Checkpoint.open(run).verify(hashes=True)


def _save_until_killed(run: Path, first: int, said: Path) -> None:
    torch.set_num_threads(1)
    for step in range(first, 1_000_000):
        values = {"w": torch.full((SIZE,), float(step))}
        for attempt in (1, 2):  # the second replaces the first
            save_checkpoint(
                run, 0, step, model=values, ema=values, optimizer=values,
                state={"attempt": attempt}, components={},
            )  # fmt: skip
            with said.open("a") as file:
                file.write(f"{step} {attempt}\n")
        prune(run, 2)


def test_kill_at_random_moments(tmp_path: Path) -> None:
    run, said = tmp_path / "run", tmp_path / "said"
    said.touch()
    moments = random.Random(0)
    module = torch.nn.Module()
    module.register_buffer("w", torch.zeros(SIZE))
    for _ in range(10):
        before = said.stat().st_size
        first = 1 + int(said.read_text().split()[-2]) if before else 0
        process = start(_save_until_killed, run, first, said)
        while said.stat().st_size == before:
            assert process.exitcode is None
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        step, attempt = map(int, said.read_text().split()[-2:])

        found = Checkpoint.open(run)
        found.verify(hashes=True)
        assert (found.step, found.state["attempt"]) >= (step, attempt), "a finished save is lost"
        found.load_model(module)
        assert torch.equal(module.w, torch.full((SIZE,), float(found.step)))
    clean_leftovers(run)
    assert not [name for name in os.listdir(run) if name.startswith(".")]
    prune(run, 1)
    assert os.listdir(run) == [found.path.name.removeprefix(".replaced-")]
