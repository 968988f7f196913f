"""`kinema generate` under torchrun: the same videos as from one process, and failures that end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kinema.media.write import write_video
from tests.unit.generation.tiny import write_run

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a kite", "a boat", "a fish", "a star", "a kite")
"""The last one asks for a name that is taken."""


def run(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`kinema generate` alone, or by torchrun."""
    kinema = str(Path(sys.executable).with_name("kinema"))
    start = [kinema]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start = [*torchrun, f"--nproc-per-node={processes}", "--no-python", kinema]
    return subprocess.run(
        [*start, "generate", *map(str, arguments)],
        cwd=ROOT,
        # One thread each, as torchrun has it: with more, matrix products add in another order.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), "stdit2")


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(1, *call(checkpoint, folder))
    assert done.returncode == 0, done.stderr
    return folder


def call(checkpoint: Path, folder: Path) -> list[object]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return ["--ckpt-path", checkpoint, *prompts, "--batch-size", 2, "--seed", 7,
            "--loop", 2, "--save-dir", folder]  # fmt: skip


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_the_same_videos_as_one(
    processes: int, checkpoint: Path, alone: Path, tmp_path: Path
) -> None:
    done = run(processes, *call(checkpoint, tmp_path))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in alone.iterdir()}
    assert len(names) == 2 * len(PROMPTS)
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        if name.endswith(".mp4"):
            assert (tmp_path / name).read_bytes() == (alone / name).read_bytes(), name
        else:
            requests = [json.loads((f / name).read_text())["request"] for f in (tmp_path, alone)]
            assert requests[0] == requests[1]
    # Each video is told of once, by whoever made it.
    printed = sorted(Path(line).name for line in done.stdout.splitlines() if line.endswith(".mp4"))
    assert printed == sorted(n for n in names if n.endswith(".mp4"))


def test_a_failure_of_one_ends_all_with_its_message(checkpoint: Path, tmp_path: Path) -> None:
    """The second prompt's reference has a sound header over broken frames: its process fails."""
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8)
    for name in ("good.mp4", "bad.mp4"):
        write_video(tmp_path / name, frames, 8.0)
    whole = (tmp_path / "bad.mp4").read_bytes()
    sound = len(whole) // 3
    (tmp_path / "bad.mp4").write_bytes(whole[:sound] + bytes(len(whole) - sound))
    out = tmp_path / "out"
    done = run(
        2, "--ckpt-path", checkpoint, "--save-dir", out, "--num-sampling-steps", 2,
        "--prompt", "a", "--reference-path", tmp_path / "good.mp4", "--mask-strategy", "0,0,-2",
        "--prompt", "b", "--reference-path", tmp_path / "bad.mp4", "--mask-strategy", "0,0,-2",
    )  # fmt: skip
    assert done.returncode != 0
    assert "process 1 of 2" in done.stderr
    assert "bad.mp4" in done.stderr
    assert not list(out.glob("b*"))
