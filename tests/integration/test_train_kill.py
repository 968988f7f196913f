"""kill -9 at any moment costs at most the steps since the last checkpoint, and changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kinema.checkpoint.run import Checkpoint
from tests.integration.train_fixtures import write_clips

NAMES = ("whole", "broken")
ROOT = Path(__file__).resolve().parents[2]


def drive(manifest: Path, outputs: Path, seed: int, attempts: int) -> dict[str, object]:
    settings = ["max_steps=90", "ckpt_every=3", "epochs=20", "keep_checkpoints=2", "log_every=4"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.integration.kill_driver", str(manifest), str(outputs)),
            *(str(seed), str(attempts), *settings),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


@pytest.mark.slow
def test_killed_ten_times_the_weights_are_the_same(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path)
    whole = drive(manifest, tmp_path / "whole", seed=0, attempts=0)
    broken = drive(manifest, tmp_path / "broken", seed=1, attempts=10)
    assert whole["status"] == broken["status"] == 0
    assert broken["killed"] == {"saving": 5, "training": 5}
    # A kill in the moment of its making may leave an empty run folder.
    (one,), (other,) = ((p.parent for p in (tmp_path / n).glob("0*/run.json")) for n in NAMES)
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    assert first.step == second.step == 90
    for section in ("model", "ema"):
        assert first.section_hash(section) == second.section_hash(section)  # type: ignore[arg-type]
    assert first.state["data"] == second.state["data"]
    first_log, second_log = (
        [(r["step"], r["loss"]) for r in map(json.loads, (run / "log.jsonl").open())]
        for run in (one, other)
    )
    assert first_log == second_log
    assert not list(other.glob(".saving-*"))
