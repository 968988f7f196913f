"""Several processes train as one would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from kinema.checkpoint.run import Checkpoint
from kinema.checkpoint.weights import iterate_tensors
from tests.integration.train_fixtures import write_clips

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios of `rank_driver`, run once."""
    folder = tmp_path_factory.mktemp("ranks")
    manifest = write_clips(folder)
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.rank_driver", str(manifest), str(folder / "out")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def newest(runs: Path, name: str) -> Checkpoint:
    return Checkpoint.open(runs / name / "000-smoke")


def rows(runs: Path, name: str, epoch: int) -> Counter[int]:
    lines = [json.loads(line) for line in (runs / name / "rows.jsonl").read_text().splitlines()]
    return Counter(row for line in lines if line["epoch"] == epoch for row in line["rows"])


@pytest.mark.parametrize(
    ("several", "alone", "steps"),
    [("whole", "alone", 5), ("masked", "masked-alone", 3), ("shared", "shared-alone", 3)],
)
def test_two_ranks_equal_one_of_the_same_global_batch(
    runs: Path, several: str, alone: str, steps: int
) -> None:
    assert newest(runs, several).step == newest(runs, alone).step == steps
    two, one = (dict(iterate_tensors(newest(runs, n).path)) for n in (several, alone))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)
    losses = [
        [json.loads(line)["loss"] for line in (runs / n / "000-smoke" / "log.jsonl").open()]
        for n in (several, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_ranks_share_is_counted_once(runs: Path) -> None:
    """Also what one of them could not read, which both leave out."""
    shared, alone = (
        [json.loads(line) for line in (runs / n / "000-smoke" / "log.jsonl").open()]
        for n in ("shared", "shared-alone")
    )
    assert [r.get("unreadable") for r in shared] == [r.get("unreadable") for r in alone]
    assert shared[0]["unreadable"] == 1
    for of_two, of_one in zip(shared, alone, strict=True):
        names = [name for name in of_one if name.startswith("loss")]
        assert [of_two[n] for n in names] == pytest.approx([of_one[n] for n in names], rel=1e-4)


def test_ranks_that_cannot_share_are_told_so(runs: Path) -> None:
    for rank in range(3):
        error = (runs / "shared-in-thirds" / f"error-{rank}.txt").read_text()
        assert "parallel.sequence" in error
    assert not list((runs / "shared-in-thirds").glob("000*"))


@pytest.mark.parametrize(("first", "second"), [("whole", "resumed"), ("masked", "masked-resumed")])
def test_two_ranks_resume_bit_for_bit(runs: Path, first: str, second: str) -> None:
    whole, resumed = newest(runs, first), newest(runs, second)
    assert resumed.step == whole.step
    for section in ("model", "ema"):
        assert whole.section_hash(section) == resumed.section_hash(section)  # type: ignore[arg-type]
    assert whole.state["data"] == resumed.state["data"]


def test_every_clip_comes_once_an_epoch_also_when_ranks_change_in_the_middle(runs: Path) -> None:
    everything = Counter(range(24))
    assert rows(runs, "whole", 0) == everything
    assert rows(runs, "fewer", 0) == everything
    assert newest(runs, "fewer").state["world_size"] == 1


def test_a_rank_whose_loss_is_not_finite_stops_all(runs: Path) -> None:
    folder = runs / "spoiled"
    texts = [(folder / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "step 1" in texts[0]
    assert "rank 1" in texts[0]
    assert "rank 0" not in texts[0]
    assert newest(runs, "spoiled").step == 1
    report = json.loads((folder / "000-smoke" / "nonfinite-step1.json").read_text())
    assert [one["rank"] for one in report["ranks"]] == [1]


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(runs: Path) -> None:
    stopped = newest(runs, "stopped")
    assert stopped.step < 5
    assert "stopped by" in (runs / "stopped" / "000-smoke" / "events.jsonl").read_text()
