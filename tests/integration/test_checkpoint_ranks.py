"""Checkpoints of several ranks: in any layout, after a kill, on a full disk, and damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kinema.checkpoint.run as checkpoint_run
from kinema.checkpoint.errors import CheckpointError
from kinema.checkpoint.run import Checkpoint, save_checkpoint
from kinema.checkpoint.shares import share_out
from kinema.checkpoint.weights import iterate_tensors, save_weights
from kinema.cli.main import app
from kinema.config.settings import to_dict
from kinema.generation.pipeline import Pipeline
from kinema.telemetry.run_log import read_log
from kinema.training import saving
from kinema.training.loop import Trainer
from kinema.training.run import train
from tests.integration.train_fixtures import smoke, write_clips
from tests.unit.generation.tiny import tiny_config, tiny_parts

ROOT = Path(__file__).resolve().parents[2]
ROWS = 16
"""One step of an epoch on four ranks, two on two."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), count=ROWS)


def drive(mode: str, manifest: Path, folder: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.checkpoint_driver", mode, manifest, folder],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def double(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drive("double", manifest, tmp_path_factory.mktemp("double") / "out")


@pytest.fixture(scope="module")
def single(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `in_single` of the driver leaves; its layouts were compared there."""
    return drive("single", manifest, tmp_path_factory.mktemp("single") / "out")


def events(runs: Path, name: str) -> str:
    return (runs / name / "000-smoke" / "events.jsonl").read_text()


def rows(runs: Path, name: str, epoch: int) -> Counter[int]:
    lines = [json.loads(line) for line in (runs / name / "rows.jsonl").read_text().splitlines()]
    return Counter(row for line in lines if line["epoch"] == epoch for row in line["rows"])


def test_a_run_moves_between_ranks_and_layouts_as_if_nothing_was(double: Path) -> None:
    """zero3 on four, zero2 on two, one alone, zero3 on two; in float64."""
    alone, moved = (read_log(double / name / "000-smoke") for name in ("alone", "moved"))
    assert [r["step"] for r in moved] == [r["step"] for r in alone] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in moved] == pytest.approx([r[key] for r in alone], rel=1e-10)
    for epoch in range(4):
        assert rows(double, "moved", epoch) == Counter(range(ROWS))
    last = [Checkpoint.open(double / name / "000-smoke") for name in ("alone", "moved")]
    for section in ("model", "ema"):
        one, other = (dict(iterate_tensors(c.path, section=section)) for c in last)
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12)


def test_a_rank_killed_while_a_checkpoint_is_written_costs_that_checkpoint(single: Path) -> None:
    left = (single / "killed.txt").read_text().split()
    assert [n for n in left if "step" in n and n[0] != "."] == ["epoch0-global_step1"]
    assert ".saving-epoch0-global_step2" in left
    assert "removed .saving-epoch0-global_step2" in events(single, "killed")
    run = single / "killed" / "000-smoke"
    assert not list(run.glob(".*"))


def test_ranks_that_share_a_model_resume_bit_for_bit(single: Path) -> None:
    whole, resumed = (Checkpoint.open(single / n / "000-smoke") for n in ("even", "killed"))
    assert whole.step == resumed.step == 3
    assert len(whole.files["model"]) == 3, "two files of weights and their index"
    for section in ("model", "ema", "optimizer"):
        of_one, of_other = whole.files[section], resumed.files[section]
        of_one.pop("optimizer/.metadata", None)  # has a number of its own for every save
        of_other.pop("optimizer/.metadata", None)
        assert of_one == of_other
    assert {r.rank for r in whole.files["optimizer"].values()} == {0, 1}
    assert whole.state["data"] == resumed.state["data"]


def test_every_clip_comes_once_after_a_resume_on_fewer_ranks_in_mid_epoch(single: Path) -> None:
    assert rows(single, "fewer", 0) == Counter(range(ROWS))
    assert Checkpoint.open(single / "fewer" / "000-smoke").state["world_size"] == 1


def test_an_altered_newest_checkpoint_is_passed_over_by_name(single: Path) -> None:
    text = events(single, "altered")
    assert "epoch1-global_step3 is passed over" in text
    assert "optimizer/__1_0.distcp has other content than was written (written by rank 1)" in text
    resumed = Checkpoint.open(single / "altered" / "000-smoke")
    assert resumed.step == 3
    assert (single / "altered/000-smoke/set-aside/epoch1-global_step3").is_dir()


def test_a_full_disk_on_one_rank_ends_all_with_its_name_and_keeps_what_was(single: Path) -> None:
    folder = single / "full"
    texts = [(folder / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1]
    where = folder / "000-smoke" / "epoch0-global_step2"
    assert texts[0].startswith(f"{where}/")
    assert (
        ": rank 1: could not be written: a quota or a limit on file size, as the disk has"
        in texts[0]
    )
    names = [p.name for p in (folder / "000-smoke").iterdir() if "step" in p.name]
    assert names == ["epoch0-global_step1"]
    Checkpoint.open(folder / "000-smoke").verify(hashes=True)


@pytest.mark.parametrize("how", ["cut", "missing", "flipped"])
@pytest.mark.parametrize(
    ("file", "rank"),
    [
        ("optimizer/__0_0.distcp", 0),
        ("optimizer/__1_0.distcp", 1),
        ("optimizer/.metadata", 0),
        ("model-00002-of-00002.safetensors", 0),
        ("ema-00001-of-00002.safetensors", 1),
        ("model.safetensors.index.json", 0),
    ],
)
def test_a_damaged_part_is_named_with_the_rank_that_wrote_it(
    single: Path, tmp_path: Path, file: str, rank: int, how: str
) -> None:
    path = tmp_path / "epoch1-global_step3"
    shutil.copytree(single / "even" / "000-smoke" / path.name, path)
    Checkpoint.open(path).verify(hashes=True)
    data = bytearray((path / file).read_bytes())
    if how == "missing":
        (path / file).unlink()
    elif how == "cut":
        (path / file).write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        (path / file).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path).verify(hashes=True)
    assert f"{file} " in caught.value.what
    assert f"(written by rank {rank})" in caught.value.what
    assert str(path) in str(caught.value)
    assert caught.value.hint is not None


def test_a_person_can_verify_a_run(single: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(single / "even" / "000-smoke", run)
    whole = CliRunner().invoke(app, ["weights", "verify", str(run)])
    assert whole.exit_code == 0, whole.output
    assert whole.stdout.count(": whole\n") == 3
    file = run / "epoch0-global_step2" / "optimizer" / "__1_0.distcp"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    damaged = CliRunner().invoke(app, ["weights", "verify", str(run)])
    assert damaged.exit_code == 1
    assert damaged.stdout.count(": whole\n") == 2
    assert "__1_0.distcp has other content than was written (written by rank 1)" in damaged.stdout
    one = CliRunner().invoke(app, ["weights", "verify", str(run / "epoch1-global_step3")])
    assert (one.exit_code, one.stdout.count(": whole\n")) == (0, 1)


def test_ranks_that_check_hashes_together_read_each_file_once(single: Path, tmp_path: Path) -> None:
    path = tmp_path / "epoch1-global_step3"
    shutil.copytree(single / "even" / "000-smoke" / path.name, path)
    for file in path.rglob("*.safetensors"):
        file.write_bytes(b"x" * file.stat().st_size)
    found = []
    for rank in range(3):
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(path).verify(hashes=True, share=(rank, 3))
        found += [w for w in caught.value.what.split() if w.endswith(".safetensors")]
    assert sorted(found) == sorted(p.name for p in path.rglob("*.safetensors"))


def test_weights_of_many_ranks_convert_and_are_known(single: Path, tmp_path: Path) -> None:
    run = single / "even" / "000-smoke"
    checked = CliRunner().invoke(app, ["models", "--check", str(run)], catch_exceptions=False)
    assert checked.exit_code == 0, checked.output
    assert "STDiT3" in checked.stdout
    target = tmp_path / "one"
    words = ["weights", "convert", str(run), str(target), "--to", "kinema"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert (target / "model.safetensors").is_file()
    saved = dict(iterate_tensors(Checkpoint.open(run).path))
    for name, value in iterate_tensors(target):
        assert torch.equal(value, saved[name])


def test_a_checkpoint_in_several_files_generates_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(vae_weights="../../vae.safetensors")
    parts = tiny_parts(config)
    save_weights(tmp_path / "vae.safetensors", parts.vae.state_dict())
    weights = parts.model.state_dict()
    clips = []
    for most in (2**30, 20_000):
        monkeypatch.setattr(checkpoint_run, "share_out", partial(share_out, most=most))
        run = tmp_path / f"run-{most}"
        saved = save_checkpoint(
            run, 0, 1, model=weights, ema=weights, state={}, components=to_dict(config)
        )
        assert (saved.path / "ema.safetensors").is_file() == (most > 20_000)
        assert (saved.path / "ema.safetensors.index.json").is_file() == (most == 20_000)
        pipeline = Pipeline.from_pretrained(run, device="cpu")
        clips.append(pipeline.generate("a kite", seed=3, num_frames=1, num_sampling_steps=1))
    assert (clips[0].frames == clips[1].frames).all()


class Steps:
    """Notes when updates end and parts of a checkpoint are written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, hold: bool) -> None:
        self.order: list[str] = []
        self.go = threading.Event()
        honest_step, honest_write = Trainer.train_step, saving.write_part

        def train_step(trainer: Trainer, *args: Any) -> Any:
            done = honest_step(trainer, *args)
            self.order.append(f"updated {trainer.state.step}")
            if trainer.state.step == 2:
                self.go.set()
            return done

        def write_part(plan: Any, *args: Any) -> None:
            self.order.append(f"writing {plan.step}")
            if hold and plan.step == 1:
                assert self.go.wait(60), "the step waited for the write"
            honest_write(plan, *args)
            self.order.append(f"written {plan.step}")

        monkeypatch.setattr(Trainer, "train_step", train_step)
        monkeypatch.setattr(saving, "write_part", write_part)


def test_the_step_goes_on_while_what_was_put_aside_is_written(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("max_steps=2", "ckpt_every=1")
    with monkeypatch.context() as patch:
        steps = Steps(patch, hold=False)
        waiting = train(smoke(manifest, tmp_path / "a", *settings, "async_save=false")).run
        assert steps.order == [
            *("updated 1", "writing 1", "written 1"),
            *("updated 2", "writing 2", "written 2"),
        ]
    steps = Steps(monkeypatch, hold=True)
    beside = train(smoke(manifest, tmp_path / "b", *settings)).run
    first = [o for o in steps.order if o != "writing 1"]
    assert first == ["updated 1", "updated 2", "written 1", "writing 2", "written 2"]
    for name in ("epoch0-global_step1", "epoch0-global_step2"):
        # Written after the second update, and yet of the first.
        one, other = (Checkpoint.open(run / name) for run in (waiting, beside))
        for section in ("model", "ema"):
            assert one.section_hash(section) == other.section_hash(section)
        moments = [c.files["optimizer"]["optimizer/__0_0.distcp"].sha256 for c in (one, other)]
        assert moments[0] == moments[1]


def test_a_save_that_failed_ends_the_run_at_the_next_step(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr(saving, "write_part", refuse)
    with pytest.raises(CheckpointError, match="rank 0: could not be written: PermissionError"):
        train(smoke(manifest, tmp_path, "max_steps=50", "epochs=50", "ckpt_every=10"))
    run = tmp_path / "000-smoke"
    assert 10 <= len(read_log(run)) < 20  # and not where the next one is saved
    assert not [p for p in run.iterdir() if "step" in p.name]


def test_too_little_space_is_said_before_the_first_step(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "free_bytes", lambda path: 1000)
    run = train(smoke(manifest, tmp_path, "max_steps=1")).run
    lines = [json.loads(line)["event"] for line in (run / "events.jsonl").open()]
    warnings = [i for i, line in enumerate(lines) if "needs 1.0 MB, 0.0 MB are free" in line]
    assert warnings
    assert warnings[0] < lines.index("saved")


@pytest.mark.parametrize("save", [True, False])
def test_an_error_leaves_the_save_in_flight_whole(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: bool
) -> None:
    """Not so for a person who interrupts twice."""
    ended: type[BaseException] = RuntimeError if save else KeyboardInterrupt
    gate = threading.Event()
    honest: Callable[..., None] = saving.write_part

    def write_part(*args: Any) -> None:
        gate.wait(30)
        honest(*args)

    def stop(step: int, record: Any) -> None:
        if save:
            threading.Timer(0.2, gate.set).start()
        raise ended

    monkeypatch.setattr(saving, "write_part", write_part)
    with pytest.raises(ended):
        train(smoke(manifest, tmp_path, "ckpt_every=1", "max_steps=9"), on_step=stop)
    found = [p.name for p in (tmp_path / "000-smoke").iterdir() if p.name.startswith("epoch")]
    gate.set()
    assert found == (["epoch0-global_step1"] if save else [])
