"""What records say of real runs: on several ranks, over resumes, with validation and profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from kinema.checkpoint.folder import checkpoint_folders
from kinema.checkpoint.run import Checkpoint
from kinema.checkpoint.weights import iterate_tensors
from kinema.cli.main import main
from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest
from kinema.models.build import build_text_encoder
from kinema.telemetry.run_json import read_run_json, update_run_json
from kinema.telemetry.run_log import read_log
from kinema.training.encode import write_text_cache
from kinema.training.run import train
from kinema.training.start import Start
from kinema.training.waits import SHARDED_WAITS
from tests.integration.train_fixtures import smoke, write_classes, write_clips
from tests.unit.telemetry.wandb_file import read

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("held-out"), count=8, seed=9)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, manifest: Path, held_out: Path
) -> dict[str, list[dict[str, Any]]]:
    """Records of all scenarios of `telemetry_driver`, run once."""
    folder = tmp_path_factory.mktemp("ranks") / "out"
    module = "tests.integration.telemetry_driver"
    done = subprocess.run(
        [sys.executable, "-m", module, str(manifest), str(held_out), str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: read_log(path / "000-smoke") for path in folder.iterdir()}


def test_waits_inside_sharded_passes_are_measured(
    runs: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    [counts] = tmp_path_factory.getbasetemp().glob("ranks[0-9]*/out/zero3/waits.json")
    counted = json.loads(counts.read_text())
    assert set(counted) == set(SHARDED_WAITS)
    assert min(counted.values()) >= len(runs["zero3"])


def validation(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key.startswith("val")}


@pytest.mark.parametrize("name", ["two", "zero3"])
def test_validation_does_not_depend_on_ranks_nor_layout(
    runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    alone = [validation(record) for record in runs["alone"]]
    assert [bool(found) for found in alone] == [False, True, True]  # every 2, and at the end
    assert list(alone[1]) == [
        "val_loss", "val/16x16-5f", "val/16x16-3f",
        "val_t/0.17", "val_t/0.33", "val_t/0.50", "val_t/0.67", "val_t/0.83",
    ]  # fmt: skip
    assert alone[1] == alone[2]  # the weights stood still
    assert len(set(alone[1].values())) == 8
    exact = {"two": 0.0, "zero3": 1e-12}[name]
    for found, expected in zip(map(validation, runs[name]), alone, strict=True):
        assert found == pytest.approx(expected, rel=exact, abs=0.0)


@pytest.mark.parametrize("name", ["two", "zero3"])
def test_several_ranks_report_as_one(runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    alone, several = runs["alone"], runs[name]
    same = ("loss", "grad_norm", "weight_norm", "lr")
    for one, two in zip(alone, several, strict=True):
        levels = {key for key in one if key.startswith("loss_t/")}
        assert levels
        assert levels == {key for key in two if key.startswith("loss_t/")}
        for key in (*same, *levels):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
        assert "collective_wait_pct" not in one
        assert two["wait/collective_s"] > 0
        assert two["wait/collective_worst_pct"] >= two["collective_wait_pct"] > 0
        assert two["wait/collective_worst_rank"] in (0, 1)
        assert two["wait/data_worst_pct"] >= two["data_wait_pct"]
        # The same work over the same clips, whatever time it takes.
        per_token = one["tflops_per_rank"] / one["tokens_per_s"]
        assert 2 * two["tflops_per_rank"] / two["tokens_per_s"] == pytest.approx(per_token)
        assert two["tokens_per_s"] / two["samples_per_s"] == pytest.approx(
            one["tokens_per_s"] / one["samples_per_s"]
        )
        assert two["mfu_pct"] is None
        assert 0 < two["goodput_pct"] < 100
        assert two["memory/host_gib"] > 0.05


def test_a_resume_goes_on_with_sums_and_goodput(manifest: Path, tmp_path: Path) -> None:
    options = ("log_every=4", "ema_decay=null", "async_save=false")
    whole = train(smoke(manifest, tmp_path / "a", *options, "max_steps=4"), device="cpu").run
    part = train(smoke(manifest, tmp_path / "b", *options, "max_steps=2"), device="cpu").run
    assert 0 < (time.time() - _first_start(part)) < 3600
    began = time.time() - 3600
    update_run_json(part, {"first_start": datetime.fromtimestamp(began, UTC).isoformat()})
    useful = Checkpoint.open(part).state["useful_s"]
    train(smoke(manifest, tmp_path / "b", *options, "max_steps=4"), Start(load=part), device="cpu")
    [*_, expected], [*_, found] = read_log(whole), read_log(part)
    exact = [k for k in expected if k.startswith(("loss", "grad_norm", "weight_norm", "lr"))]
    assert len([k for k in exact if k.startswith("loss_t/")]) > 3
    assert {k: found[k] for k in exact} == {k: expected[k] for k in exact}
    assert _first_start(part) == pytest.approx(began)
    after = Checkpoint.open(part).state["useful_s"]
    assert after > useful > 0
    # Of the whole time since the first start, not since this one.
    assert 0 < found["goodput_pct"] < 100 * after / 3600


def _first_start(run: Path) -> float:
    return datetime.fromisoformat(read_run_json(run)["first_start"]).timestamp()


@pytest.mark.parametrize("recipe", ["tiny/smoke", "tiny/smoke-1.1"])
def test_the_averaged_weights_are_validated_and_then_given_back(
    manifest: Path, held_out: Path, tmp_path: Path, recipe: str
) -> None:
    def run(name: str, *overrides: str) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
        options = ("max_steps=3", "optim.lr=0.01", "keep_checkpoints=null", *overrides)
        wanted = smoke(manifest, tmp_path / name, "ckpt_every=1", *options, name=recipe)
        made = train(wanted, device="cpu").run
        losses = [r["val_loss"] for r in read_log(made) if "val_loss" in r]
        # Each is copied and written while training, and validation, go on.
        return losses, [dict(iterate_tensors(path)) for path in checkpoint_folders(made)]

    held = (f"validation.path='{held_out}'", "validation.clips_per_bucket=2", "validation.every=1")
    plain, weights = run("plain", "ema_decay=null", *held)
    slow, validated = run("slow", "ema_decay=0.9999999", *held)
    _, untouched = run("without", "ema_decay=null")
    assert len(set(plain)) == 3
    # An average that hardly moves is what training began with.
    assert slow == pytest.approx([slow[0]] * 3, rel=1e-4)
    assert abs(plain[-1] - slow[-1]) > 0.01
    assert len(untouched) == 3
    for step, expected in enumerate(untouched):
        for name, tensor in expected.items():
            assert torch.equal(weights[step][name], tensor), name
            assert torch.equal(validated[step][name], tensor), name


def test_clips_that_cannot_be_read_are_left_out(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = write_clips(tmp_path / "held", count=4, seed=9)
    (clips.parent / "clips" / "clips" / "00001.mp4").write_bytes(b"no film")
    options = (f"validation.path='{clips}'", "validation.every=2", "max_steps=2")
    run = train(smoke(manifest, tmp_path / "out", *options), device="cpu").run
    assert "val_loss" in read_log(run)[-1]
    assert capsys.readouterr().err.count("validation leaves out clips/clips/00001.mp4") == 1


def test_clips_that_are_trained_on_are_refused_before_there_is_a_run(
    manifest: Path, tmp_path: Path
) -> None:
    recipe = smoke(manifest, tmp_path, f"validation.path='{manifest}'", "validation.every=2")
    with pytest.raises(KinemaError, match="24 of its 24 clips are trained on"):
        train(recipe, device="cpu")
    assert not list(tmp_path.iterdir())


def test_profile_and_wandb_from_the_command_line(
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    command = ["train", "tiny/smoke", "--data-path", str(manifest), "--outputs", str(tmp_path)]
    command += ["--device", "cpu", "--max_steps", "100", "--epochs", "100", "--ckpt_every", "2"]
    command += ["--tracking.tensorboard", "false", "--wandb", "--profile", "--profile-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["kinema", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    run = tmp_path / "000-smoke"
    said = capsys.readouterr().err
    assert "2 steps of" in said
    assert "what to try next:" in said
    assert (run / "profile" / "trace-rank0.json.gz").is_file()
    assert "forward" in (run / "profile" / "table.txt").read_text()
    assert not list(run.glob("epoch*"))  # what was only looked at is not kept
    [file] = (run / "wandb").glob("offline-run-*/*.wandb")
    run_id, config, logged = read(file)
    assert run_id == read_run_json(run)["wandb"]["id"]
    assert config["name"] == "smoke"
    assert config["model"]["depth"] == 1
    records = {record["step"]: record for record in read_log(run)}
    for row in logged:
        assert row["loss"] == records[row["step"]]["loss"]
        assert row["tokens_per_s"] == records[row["step"]]["tokens_per_s"]
    assert len(logged) == len(records) > 3


@pytest.mark.parametrize("recipe", ["tiny/smoke-1.0", "tiny/smoke-dit"])
def test_every_model_is_validated(
    manifest: Path, held_out: Path, tmp_path: Path, recipe: str
) -> None:
    if recipe == "tiny/smoke-dit":
        manifest = write_classes(manifest, classes=10)
        held_out = write_classes(held_out, classes=10)
    options = (
        *(f"validation.path='{held_out}'", "validation.every=5", "max_steps=1"),
        *("vae_weights=random", "validation.clips_per_bucket=3"),
    )
    run = train(smoke(manifest, tmp_path, *options, name=recipe), device="cpu").run
    found = validation(read_log(run)[-1])
    by_level = [value for key, value in found.items() if key.startswith("val_t/")]
    assert len(by_level) == 10
    assert found["val_loss"] == pytest.approx(sum(by_level) / 10)
    # An untrained network says zero: of noise, the mean square is 1.
    assert found["val_loss"] == pytest.approx(1.0, abs=0.2)


def test_captions_of_held_out_clips_come_from_a_cache_of_their_own(
    manifest: Path, held_out: Path, tmp_path: Path
) -> None:
    clips = Manifest.read(held_out)
    captions = pa.array([f"another caption {row}" for row in range(len(clips))])
    table = clips.table.set_column(clips.table.column_names.index("text"), "text", captions)
    other = held_out.with_name("other-captions.parquet")
    Manifest(table, held_out.parent).write(other)
    options = (
        *(f"validation.path='{other}'", "validation.every=5", "max_steps=3"),
        *("optim.lr=0.05", "ema_decay=null", "optim.schedule.warmup_steps=0"),
    )
    plain = smoke(manifest, tmp_path / "plain", *options)
    assert plain.text is not None
    encoder = build_text_encoder(plain.text, None)
    write_text_cache(Manifest.read(manifest), encoder, tmp_path / "trained", dtype="float32")
    write_text_cache(Manifest.read(other), encoder, tmp_path / "held", dtype="float32")

    cached = (*options, f"text_cache='{tmp_path}/trained'")
    with pytest.raises(KinemaError, match="has no embedding of 'another caption"):
        train(smoke(manifest, tmp_path / "refused", *cached), device="cpu")
    with_both = smoke(
        manifest, tmp_path / "cached", *cached, f"validation.text_cache='{tmp_path}/held'"
    )
    losses = [
        validation(read_log(train(recipe, device="cpu").run)[-1]) for recipe in (plain, with_both)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
