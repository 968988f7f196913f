"""A whole training with sharded weights: the same losses, exact resume, previews, bad clips."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinema.checkpoint.run import Checkpoint
from kinema.checkpoint.weights import iterate_tensors
from kinema.media.probe import probe
from tests.integration.train_fixtures import write_clips

ROOT = Path(__file__).resolve().parents[2]
BROKEN = range(0, 24, 2)
"""Clips of the second manifest that cannot be read."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios of `sharded_driver`, run once."""
    folder = tmp_path_factory.mktemp("sharded")
    manifest = write_clips(folder)
    broken = folder / "broken"
    broken.mkdir()
    shutil.copytree(folder / "clips", broken / "clips")
    shutil.copy(manifest, broken)
    for number, file in enumerate(sorted((broken / "clips").rglob("*.mp4"))):
        if number in BROKEN:
            file.write_bytes(b"no video")
    given = (manifest, folder / "out", broken / manifest.name)
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.sharded_driver", *map(str, given)],
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


def logged(runs: Path, name: str, key: str) -> list[float]:
    lines = (runs / name / "000-smoke" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def assert_same_weights(runs: Path, name: str, other: str) -> None:
    got, want = (dict(iterate_tensors(newest(runs, n).path)) for n in (name, other))
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["zero2", "zero3", "alone"])
def test_sharded_ranks_train_as_whole_copies_do(runs: Path, name: str) -> None:
    for key in ("loss", "grad_norm"):
        assert logged(runs, name, key) == pytest.approx(logged(runs, "copies", key), rel=1e-4)
    assert newest(runs, name).step == 4
    assert_same_weights(runs, name, "copies")


def test_a_sharded_run_resumes_bit_for_bit(runs: Path) -> None:
    whole, resumed = newest(runs, "zero3"), newest(runs, "resumed")
    assert resumed.step == whole.step == 4
    for section in ("model", "ema"):
        assert whole.section_hash(section) == resumed.section_hash(section)  # type: ignore[arg-type]
    assert logged(runs, "resumed", "loss") == logged(runs, "zero3", "loss")


def test_rank_0_renders_previews_of_sharded_weights(runs: Path) -> None:
    assert probe(runs / "zero2" / "000-smoke" / "preview" / "step4" / "00.mp4").num_frames == 5


def test_the_rank_whose_loss_is_not_finite_is_named(runs: Path) -> None:
    texts = [(runs / "spoiled" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    assert "rank 1 (loss nan, gradient norm nan, 16x16" in texts[0]
    assert "rank 0" not in texts[0]


def test_a_rank_without_readable_clips_does_not_hold_up_the_others(runs: Path) -> None:
    assert logged(runs, "broken-zero3", "loss") == pytest.approx(logged(runs, "broken", "loss"))
    lines = (runs / "broken-zero3" / "rows.jsonl").read_text().splitlines()
    ranks = [json.loads(line)["rank"] for line in lines if not json.loads(line)["rows"]]
    assert set(ranks) == {0, 1}
    assert len(ranks) < len(lines)
    assert_same_weights(runs, "broken-zero3", "broken")
