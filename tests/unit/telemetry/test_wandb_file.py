"""The real wandb, offline: what it writes is what was logged."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from kinema.telemetry.config import WandbConfig
from kinema.telemetry.run_json import read_run_json
from kinema.telemetry.run_log import RunLog
from tests.unit.telemetry.wandb_file import Contents, read


def read_whole(file: Path) -> Contents:
    """Of a run that has ended; on a busy machine wandb's own process writes on for a moment."""
    for _ in range(200):
        with suppress(AssertionError):  # a record that is half there
            found = read(file)
            if found[0] and found[2]:
                return found
        time.sleep(0.1)
    return read(file)


def test_an_offline_run_is_on_disk_and_a_resume_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Never the network, whatever the machine that tests has in its environment.
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = WandbConfig(project="films")
    about = {"name": "tiny", "optim": {"lr": 2e-4}}
    with RunLog(tmp_path, tensorboard=False, wandb=first, about=about) as log:
        log.step({"step": 10, "loss": 1.5, "loss_t/0.0-0.1": 2.5, "mfu_pct": None})
    known = read_run_json(tmp_path)["wandb"]
    time.sleep(1.1)  # wandb names its folder by the second, and loses a run that finds it taken
    again = WandbConfig(project="films", mode="offline")
    with RunLog(tmp_path, tensorboard=False, wandb=again, resume_step=10) as log:
        log.step({"step": 20, "loss": 1.25})
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    found = [read_whole(file) for file in files]
    assert {run_id for run_id, _, _ in found} == {known["id"]}
    assert found[0][1] == {**about, "_wandb": found[0][1].get("_wandb")}
    rows = {row["step"]: row for _, _, logged in found for row in logged}
    assert rows[10]["loss"] == 1.5
    assert rows[10]["loss_t/0.0-0.1"] == 2.5
    assert "mfu_pct" not in rows[10]
    assert rows[20]["loss"] == 1.25
