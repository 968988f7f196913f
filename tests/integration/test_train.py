"""Training as a person meets it: what is written, what goes on, what is refused."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from kinema.checkpoint.run import Checkpoint
from kinema.checkpoint.weights import iterate_tensors
from kinema.config.errors import KinemaError
from kinema.data.loader import Batch
from kinema.generation.pipeline import Pipeline
from kinema.parallel import compile as compile_module
from kinema.telemetry.run_log import read_log
from kinema.training.config import TrainRecipe
from kinema.training.draws import Draws
from kinema.training.encode import LatentMemory
from kinema.training.nonfinite import NonFiniteError
from kinema.training.run import Result
from kinema.training.run import train as train_anywhere
from kinema.training.start import Start, read_recipe
from kinema.training.tasks import LossReport, TextToVideo
from tests.integration.train_fixtures import smoke, write_clips


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("world"))


def train(recipe: TrainRecipe, start: Start | None = None, **options: Any) -> Result:
    return train_anywhere(recipe, start, device="cpu", **options)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint."""
    checkpoint = Checkpoint.open(run)
    found = {f"model {n}": t for n, t in iterate_tensors(checkpoint.path)}
    if checkpoint.has("ema"):
        found |= {f"ema {n}": t for n, t in iterate_tensors(checkpoint.path, section="ema")}
    return found


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended in the same weights, average, moments and data position, bit for bit."""
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    sections = [s for s in ("model", "ema") if first.has(s)]  # type: ignore[arg-type]
    for section in sections:
        assert first.section_hash(section) == second.section_hash(section)  # type: ignore[arg-type]
    assert first.step == second.step
    for key in ("data", "scaler", "window"):
        assert first.state[key] == second.state[key]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_log(run)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    manifest: Path, tmp_path: Path, precision: str
) -> None:
    # Seven steps of six per epoch: the second epoch begins, and log windows span the cut.
    settings = [f"precision={precision}", "accumulation=1", "log_every=2", "ckpt_every=3"]
    whole = train(smoke(manifest, tmp_path, *settings, "max_steps=7"))
    part = train(smoke(manifest, tmp_path, *settings, "max_steps=3"))
    rest = train(smoke(manifest, tmp_path, *settings, "max_steps=7"), Start(load=part.run))
    assert rest.run == part.run
    assert whole.run != part.run
    assert_same(whole.run, rest.run)
    assert losses(whole.run) == losses(rest.run)
    assert [step for step, _ in losses(whole.run)] == [1, 2, 4, 6]


def test_clips_whose_latents_are_kept_are_not_decoded_and_nothing_else_changes(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    honest = TextToVideo.loss

    def loss(self: TextToVideo, model: nn.Module, batch: Batch, draws: Draws) -> LossReport:
        decoded.append(len(batch.video))
        assert sum(batch.decoded) == len(batch.video)
        return honest(self, model, batch, draws)

    monkeypatch.setattr(TextToVideo, "loss", loss)
    settings = ("max_steps=24", "epochs=4")
    remembering = train(smoke(manifest, tmp_path, *settings))
    assert sum(decoded) < 0.8 * 24 * 4
    decoded.clear()
    monkeypatch.setattr(LatentMemory, "__contains__", lambda self, key: False)
    forgetful = train(smoke(manifest, tmp_path, *settings))
    assert sum(decoded) == 24 * 4
    assert_same(remembering.run, forgetful.run)
    assert losses(remembering.run) == losses(forgetful.run)


def test_an_autoencoder_resumes_and_its_latents_are_normalised(
    manifest: Path, tmp_path: Path
) -> None:
    whole = train(smoke(manifest, tmp_path, "max_steps=4", name="tiny/smoke-vae"))
    part = train(smoke(manifest, tmp_path, "max_steps=2", name="tiny/smoke-vae"))
    rest = train(
        smoke(manifest, tmp_path, "max_steps=4", name="tiny/smoke-vae"), Start(load=part.run)
    )
    assert_same(whole.run, rest.run)
    found = tensors(rest.run)
    assert found["model scale"].flatten().tolist() != [1.0] * 4
    record = read_log(rest.run)[-1]
    assert {"l1", "kl", "loss/16x16-5f"} <= record.keys()


def test_text_to_video_looks_through_a_trained_autoencoder_and_generates(
    manifest: Path, tmp_path: Path
) -> None:
    vae = train(smoke(manifest, tmp_path, "max_steps=2", name="tiny/smoke-vae")).run
    recipe = smoke(manifest, tmp_path, f"vae_weights='{vae}'", "max_steps=2")
    run = train(recipe).run
    components = Checkpoint.open(run).components
    assert not Path(components["vae"]["weights"]).is_absolute()
    assert components["fps"] == 8.0
    # Both moved together: the pipeline finds the autoencoder all the same.
    moved = tmp_path / "moved"
    moved.mkdir()
    for folder in (vae, run):
        shutil.move(folder, moved)
    clip = Pipeline.from_pretrained(moved / run.name, device="cpu").generate(
        "a red circle", num_sampling_steps=2
    )
    assert clip.frames.shape == (5, 16, 16, 3)

    with pytest.raises(KinemaError, match="vae_2d"):
        train(
            smoke(
                manifest,
                tmp_path,
                f"vae_weights='{moved / vae.name}'",
                "vae.vae_2d.layers_per_block=2",
            )
        )
    with pytest.raises(KinemaError, match="autoencoder"):
        train(smoke(manifest, tmp_path, f"vae_weights='{moved / run.name}'"))


def test_the_run_folder_says_what_the_run_is(manifest: Path, tmp_path: Path) -> None:
    recipe = smoke(manifest, tmp_path, "max_steps=1", "tracking.tensorboard=true")
    run = train(recipe).run
    assert run.name == "000-smoke"
    assert read_recipe(str(run / "recipe.yaml"), [], Start()) == recipe
    start = json.loads((run / "run.json").read_text())["starts"][0]
    state = Checkpoint.open(run).state
    for key in ("recipe_sha256", "manifest_sha256", "code", "world_size"):
        assert start[key] == state[key]
    assert list((run / "tensorboard").iterdir())
    record = read_log(run)[0]
    wanted = {"loss", "loss/16x16-5f", "lr", "grad_norm", "samples_per_s", "data_wait_pct"}
    phases = ("order", "data", "text", "vae", "forward", "backward")
    wanted |= {f"seconds/{name}" for name in phases}
    assert wanted <= record.keys()


def test_weights_only_opens_a_new_run(manifest: Path, tmp_path: Path) -> None:
    first = train(smoke(manifest, tmp_path, "max_steps=2"))
    second = train(
        smoke(manifest, tmp_path, "max_steps=1", "optim.lr=1e-12", "optim.weight_decay=0"),
        Start(ckpt_path=first.run),
    )
    assert second.run != first.run
    assert second.step == 1
    before, after = tensors(first.run), tensors(second.run)
    for name in before:
        if name.startswith("model"):
            torch.testing.assert_close(before[name], after[name], atol=1e-8, rtol=0)


def test_weights_of_another_model_are_refused_unless_declared(
    manifest: Path, tmp_path: Path
) -> None:
    first = train(smoke(manifest, tmp_path, "max_steps=1"))
    deeper = smoke(manifest, tmp_path, "max_steps=1", "model.depth=2")
    with pytest.raises(KinemaError, match=r"spatial_blocks\.1"):
        train(deeper, Start(ckpt_path=first.run))
    assert len(list(tmp_path.iterdir())) == 1, "a refused start leaves no run folder"
    declared = (r"(spatial|temporal)_blocks\.1\..*",)
    assert train(deeper, Start(ckpt_path=first.run, allow_new=declared)).finished


def test_start_from_scratch_keeps_all_but_the_data_position(manifest: Path, tmp_path: Path) -> None:
    other = write_clips(tmp_path / "other", count=8, seed=5)
    first = train(smoke(manifest, tmp_path, "max_steps=2"))
    with pytest.raises(KinemaError, match="start-from-scratch"):
        train(smoke(other, tmp_path, "max_steps=3"), Start(load=first.run))
    second = train(smoke(other, tmp_path, "max_steps=3"), Start(load=first.run, from_scratch=True))
    assert second.run != first.run
    assert second.step == 3
    state = Checkpoint.open(second.run).state
    assert state["data"]["epoch"] == 0
    assert [s["steps"] for s in state["data"]["segments"]] == [1]
    assert [step for step, _ in losses(second.run)] == [3]


def test_what_may_change_on_resume_is_logged_and_the_rest_refused(
    manifest: Path, tmp_path: Path
) -> None:
    recipe = smoke(manifest, tmp_path, "max_steps=1")
    first = train(recipe)
    for key in ("model.depth=2", "seed=7", "optim.eps=1e-4", "ema_decay=0.5"):
        with pytest.raises(KinemaError, match=key.partition("=")[0]):
            train(smoke(manifest, tmp_path, "max_steps=2", key), Start(load=first.run))
    train(smoke(manifest, tmp_path, "max_steps=2", "optim.lr=1e-5"), Start(load=first.run))
    starts = json.loads((first.run / "run.json").read_text())["starts"]
    assert starts[1]["changed"] == {"optim.lr": [recipe.optim.lr, 1e-05], "max_steps": [1, 2]}
    assert "optim.lr" in (first.run / "events.jsonl").read_text()
    assert read_log(first.run)[-1]["lr"] == pytest.approx(1e-5 * 2 / 3)


def test_going_back_sets_later_checkpoints_aside(manifest: Path, tmp_path: Path) -> None:
    whole = train(smoke(manifest, tmp_path, "max_steps=4", "ckpt_every=2"))
    expected = Checkpoint.open(whole.run).section_hash("model")
    earlier = whole.run / "epoch0-global_step2"
    again = train(smoke(manifest, tmp_path, "max_steps=4", "ckpt_every=2"), Start(load=earlier))
    assert again.run == whole.run
    assert (whole.run / "set-aside" / "epoch0-global_step4").is_dir()
    assert Checkpoint.open(whole.run).section_hash("model") == expected
    assert [step for step, _ in losses(whole.run)] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_version_of_the_state_is_refused(
    manifest: Path, tmp_path: Path
) -> None:
    run = train(smoke(manifest, tmp_path, "max_steps=1")).run
    file = Checkpoint.open(run).path / "state.json"
    content = json.loads(file.read_text())
    del content["state"]["version"], content["state"]["useful_s"]  # before either was there
    file.write_text(json.dumps(content))
    with pytest.raises(KinemaError, match=r"(?s)version none of the state.*--ckpt-path"):
        train(smoke(manifest, tmp_path, "max_steps=2"), Start(load=run))


def test_old_checkpoints_go(manifest: Path, tmp_path: Path) -> None:
    settings = ("max_steps=5", "ckpt_every=1", "keep_checkpoints=2")
    run = train(smoke(manifest, tmp_path, *settings)).run
    assert sorted(p.name for p in run.glob("epoch*")) == [
        "epoch0-global_step4",
        "epoch0-global_step5",
    ]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_was(
    manifest: Path, tmp_path: Path, name: str
) -> None:
    def on_step(step: int, record: dict[str, Any] | None) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.Signals[name])

    settings = ("max_steps=5", "ckpt_every=100")
    whole = train(smoke(manifest, tmp_path, *settings))
    stopped = train(smoke(manifest, tmp_path, *settings), on_step=on_step)
    assert not stopped.finished
    assert stopped.step == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    events = (stopped.run / "events.jsonl").read_text()
    assert name in events
    assert f"--load {stopped.run}" in events
    rest = train(smoke(manifest, tmp_path, *settings), Start(load=stopped.run))
    assert rest.finished
    assert_same(whole.run, rest.run)


def _spoil(monkeypatch: pytest.MonkeyPatch, factor: float, at: int | None = None) -> None:
    """Multiply the loss of one micro-batch (from 0), or of all."""
    honest, count = TextToVideo.loss, itertools.count()

    def loss(self: TextToVideo, model: nn.Module, batch: Batch, draws: Draws) -> LossReport:
        report = honest(self, model, batch, draws)
        return LossReport(report.loss * factor) if at in (None, next(count)) else report

    monkeypatch.setattr(TextToVideo, "loss", loss)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    _spoil(monkeypatch, float("nan"), at=2)
    settings = ("max_steps=5", "ckpt_every=1", f"precision={precision}")
    with pytest.raises(NonFiniteError) as caught:
        train(smoke(manifest, tmp_path, *settings))
    run = tmp_path / "000-smoke"
    text = str(caught.value)
    assert "step 2" in text
    assert "rank 0" in text
    report = json.loads((run / "nonfinite-step2.json").read_text())
    (offender,) = report["ranks"]
    assert len(offender["rows"]) == 4
    assert all(path in text for path in offender["paths"])
    newest = Checkpoint.open(run)
    assert newest.step == 2
    assert all(t.isfinite().all() for t in tensors(run).values() if t.is_floating_point())


def test_gradients_that_are_not_finite_stop_before_the_update(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, 1e38, at=1)  # the loss is finite, its gradients' squares are not
    with pytest.raises(NonFiniteError, match=r"step 1.*gradient norm inf"):
        train(smoke(manifest, tmp_path, "max_steps=5", "ckpt_every=1"))
    assert Checkpoint.open(tmp_path / "000-smoke").step == 1


def test_fp16_overflow_skips_the_update_and_lowers_the_scale(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, 1e36, at=1)  # finite as a loss, infinite once scaled
    run = train(smoke(manifest, tmp_path, "max_steps=5", "precision=fp16", "ckpt_every=100")).run
    checkpoint = Checkpoint.open(run)
    assert checkpoint.step == 5
    assert checkpoint.state["scaler"]["scale"] == 65536 / 2
    assert [s["steps"] for s in checkpoint.state["data"]["segments"]] == [0]  # six were seen
    assert [r["step"] for r in read_log(run)] == [1, 2, 3, 4, 5]


def test_fp16_that_overflows_for_ever_stops(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinema.training.loop.MAX_SKIPPED_UPDATES", 2)
    _spoil(monkeypatch, 1e37)
    with pytest.raises(NonFiniteError, match="step 0"):
        train(smoke(manifest, tmp_path, "precision=fp16"))


@pytest.mark.parametrize("batch_size", [4, 1])
def test_a_clip_that_cannot_be_read_is_reported_and_left_out(
    tmp_path: Path, batch_size: int
) -> None:
    manifest = write_clips(tmp_path, count=8)
    victim = sorted((tmp_path / "clips").rglob("*.mp4"))[3]
    victim.write_bytes(victim.read_bytes()[:100])
    size = f"data.buckets.16x16.5=[1.0, {batch_size}]"
    run = train(smoke(manifest, tmp_path / "out", size, "epochs=1", "max_steps=null")).run
    assert victim.name in (run / "events.jsonl").read_text()
    left = Checkpoint.open(run).state["window"]["unreadable"]
    assert left + sum(r.get("unreadable", 0) for r in read_log(run)) == 1


def test_an_epoch_without_a_readable_clip_is_an_error_and_moves_no_weight(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, count=4)
    for clip in (tmp_path / "clips").rglob("*.mp4"):
        clip.write_bytes(clip.read_bytes()[:100])
    with pytest.raises(KinemaError, match="none of the clips of epoch 0 could be read"):
        train(smoke(manifest, tmp_path / "out", "max_steps=5"))
    run = tmp_path / "out" / "000-smoke"
    assert read_log(run) == []
    assert not list(run.glob("epoch*"))


def test_recompute_changes_nothing_but_memory(manifest: Path, tmp_path: Path) -> None:
    for name in ("tiny/smoke", "tiny/smoke-vae"):
        plain = train(smoke(manifest, tmp_path, "max_steps=2", name=name)).run
        again = train(smoke(manifest, tmp_path, "max_steps=2", "recompute=full", name=name)).run
        first, second = tensors(plain), tensors(again)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-6)


def test_compiled_blocks_train_the_same(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, compile_blocks = CompileCounterWithBackend("eager"), compile_module.compile_blocks
    monkeypatch.setattr(compile_module, "compile_blocks", partial(compile_blocks, backend=backend))
    limit = torch._dynamo.config.recompile_limit
    try:
        first, second = (
            tensors(train(smoke(manifest, tmp_path, "max_steps=1", *more)).run)
            for more in ((), ("compile=true",))
        )
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch._dynamo.reset()
    assert backend.frame_count == 2  # a spatial and a temporal block
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-6)


def test_frozen_parts_stay_as_they_are(manifest: Path, tmp_path: Path) -> None:
    first = train(smoke(manifest, tmp_path, "max_steps=1"))
    names = (
        "freeze=[spatial_blocks, t_embedder, temporal_blocks.*.cross_attn, x_embedder.proj.bias]"
    )
    frozen = smoke(manifest, tmp_path, "max_steps=2", names)
    second = train(frozen, Start(ckpt_path=first.run))
    before, after = tensors(first.run), tensors(second.run)
    moved = {n for n in before if n.startswith("model") and not torch.equal(before[n], after[n])}
    assert any("temporal_blocks" in name for name in moved)
    assert any("x_embedder.proj.weight" in name for name in moved)
    still = ("spatial_blocks", "t_embedder", "cross_attn", "x_embedder.proj.bias")
    assert not any(part in name for name in moved for part in still)
    for nothing in ("temporal_block", "blocks.*.cross_attn", "temporal_blocks."):
        with pytest.raises(KinemaError, match=re.escape(f"named '{nothing}'")):
            train(smoke(manifest, tmp_path, f"freeze=[{nothing}]"))


def test_mistakes_are_named_before_anything_is_written(manifest: Path, tmp_path: Path) -> None:
    t5 = ("text={type: t5}", "model.caption_channels=4096", "model.model_max_length=300")
    mistakes = {
        "vae_weights": ("vae_weights=null",),
        "no such file": ("vae_weights=nowhere.safetensors",),
        "precomputed": t5,
        "text cache": ("text_cache=nowhere",),
        "probability 0": ("data.buckets={16x16: {1: [0.0, 4], 5: [0.0, 4]}}",),
        "too short": ("data.frame_interval=10",),
        "data.path": ("data.path=null",),
        "width 7": ("preview={every: 1, prompts: [a], size: [7, 7]}",),
    }
    for text, overrides in mistakes.items():
        recipe = smoke(manifest, tmp_path / "out", *overrides)
        with pytest.raises(KinemaError, match=text):
            train(recipe)
    with pytest.raises(KinemaError, match=r"nowhere\.parquet"):
        train(smoke(tmp_path / "nowhere.parquet", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_flags_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(KinemaError, match="exclude"):
        Start(load=Path("a"), ckpt_path=Path("b"))
    with pytest.raises(KinemaError, match="goes with --load"):
        Start(from_scratch=True)
    with pytest.raises(KinemaError, match="go with --ckpt-path"):
        Start(allow_new=("x",))
