"""Every generation trains: recipe to checkpoint to video, by the commands that a person types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.checkpoint.run import Checkpoint
from kinema.cli.main import main
from kinema.config.errors import KinemaError
from kinema.media.probe import probe
from kinema.telemetry.run_log import read_log
from kinema.training.config import TrainRecipe
from kinema.training.run import train as train_anywhere
from kinema.training.start import Start
from tests.integration.train_fixtures import smoke, write_classes, write_clips, write_vae
from tests.unit.models.text_folders import write_clip, write_t5

MODELS = ["tiny/smoke-1.0", "tiny/smoke-1.1", "tiny/smoke-dit"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def manifests(captioned: Path) -> dict[str, Path]:
    classes = write_classes(captioned, classes=10)
    return {name: classes if name == "tiny/smoke-dit" else captioned for name in MODELS}


@pytest.fixture
def kinema(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command line; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kinema", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def hashes(run: Path) -> tuple[str, str]:
    checkpoint = Checkpoint.open(run)
    return checkpoint.section_hash("model"), checkpoint.section_hash("ema")


@pytest.mark.parametrize("name", MODELS)
def test_commands_train_and_generate(
    name: str, manifests: dict[str, Path], tmp_path: Path, kinema: Any
) -> None:
    vae = write_vae(tmp_path / "vae.safetensors", recipe=name)
    outputs = tmp_path / "outputs"
    code, printed, err = kinema(
        "train", name, "--data-path", manifests[name], "--outputs", outputs, "--device", "cpu",
        "--vae_weights", vae, "tracking.tensorboard=false",
    )  # fmt: skip
    assert code == 0, err
    run = Path(printed.strip())
    record = read_log(run)[-1]
    assert record["loss"] == pytest.approx(record["mse"] + record["vb"])
    assert record["mse"] > 0
    assert Checkpoint.open(run).step == 4

    prompt = "3" if name == "tiny/smoke-dit" else "a red circle"
    videos = tmp_path / "videos"
    code, printed, err = kinema(
        "generate", "--ckpt-path", run, "--prompt", prompt, "--save-dir", videos,
        "--num-sampling-steps", 3, "--seed", 1,
    )  # fmt: skip
    assert code == 0, err
    (path,) = map(Path, printed.splitlines())
    info = probe(path)
    assert (info.width, info.height) == (16, 16)
    assert info.num_frames == 5


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_equals_an_uninterrupted_one(
    name: str, manifests: dict[str, Path], tmp_path: Path
) -> None:
    def train(steps: int, start: Start | None = None) -> Path:
        recipe = smoke(manifests[name], tmp_path, f"max_steps={steps}", "log_every=2", name=name)
        return train_anywhere(recipe, start, device="cpu").run

    whole, part = train(5), train(3)
    rest = train(5, Start(load=part))
    assert rest == part
    assert hashes(whole) == hashes(rest)
    assert Checkpoint.open(whole).state["window"] == Checkpoint.open(rest).state["window"]
    assert [r["vb"] for r in read_log(whole)] == [r["vb"] for r in read_log(rest)]


def test_frame_masks_take_part(manifests: dict[str, Path], tmp_path: Path) -> None:
    name = "tiny/smoke-1.1"

    def first_loss(*masks: str) -> float:
        recipe = smoke(manifests[name], tmp_path, "max_steps=1", *masks, name=name)
        return float(read_log(train_anywhere(recipe, device="cpu").run)[0]["loss"])

    assert first_loss() != first_loss("task.masks=!replace {}")


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_change_nothing(
    name: str, manifests: dict[str, Path], tmp_path: Path
) -> None:
    losses = []
    for recompute in ("none", "full"):
        settings = ("max_steps=3", f"recompute={recompute}")
        recipe = smoke(manifests[name], tmp_path, *settings, name=name)
        losses.append([r["loss"] for r in read_log(train_anywhere(recipe, device="cpu").run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        "{type: stdit, caption_channels: 16, model_max_length: 8, input_size: [5, 4, 4]}",
        "{type: pixart, caption_channels: 16, model_max_length: 8, input_size: [1, 4, 4], "
        "no_temporal_pos_emb: false}",
        "{type: stdit3, caption_channels: 16, model_max_length: 8, input_sq_size: 16}",
    ],
    ids=["stdit", "pixart", "stdit3"],
)
@pytest.mark.parametrize("process", ["{type: iddpm}", "{type: rflow}"], ids=["iddpm", "rflow"])
def test_models_train_by_either_process_through_a_video_autoencoder(
    model: str, process: str, captioned: Path, tmp_path: Path
) -> None:
    small = model.replace("}", ", depth: 1, hidden_size: 48, num_heads: 2}")
    recipe = smoke(
        captioned, tmp_path, "max_steps=2", f"model=!replace {small}",
        f"diffusion=!replace {process}",
    )  # fmt: skip
    run = train_anywhere(recipe, device="cpu").run
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in read_log(run))
    assert ("vb" in read_log(run)[0]) == ("iddpm" in process)


@pytest.mark.parametrize(("settings", "fps", "interval"), [((), 4.0, 1), (("true",), 8.0, 2)])
def test_checkpoints_say_which_frame_rate_the_model_was_told(
    settings: tuple[str, ...], fps: float, interval: int, captioned: Path, tmp_path: Path
) -> None:
    told = [f"data.tell_source_fps={value}" for value in settings]
    buckets = "data.buckets=!replace {16x16: {3: [1.0, 4]}}"
    recipe = smoke(captioned, tmp_path, "max_steps=1", "data.frame_interval=2", buckets, *told)
    components = Checkpoint.open(train_anywhere(recipe, device="cpu").run).components
    assert (components["fps"], components["frame_interval"]) == (fps, interval)


def test_classes_that_the_model_does_not_know_are_found_before_the_first_step(
    captioned: Path, tmp_path: Path
) -> None:
    with pytest.raises(KinemaError, match="is not the number of a class") as caught:
        train_anywhere(smoke(captioned, tmp_path / "out", name="tiny/smoke-dit"), device="cpu")
    assert "clips.parquet: column text" in str(caught.value)
    many = write_classes(captioned, classes=12)
    with pytest.raises(KinemaError, match="class 10 is out of range"):
        train_anywhere(smoke(many, tmp_path / "out", name="tiny/smoke-dit"), device="cpu")
    assert not (tmp_path / "out").exists()


def test_previews_are_made_while_training(manifests: dict[str, Path], tmp_path: Path) -> None:
    preview = "preview={every: 2, prompts: ['3'], num_frames: 1, num_sampling_steps: 2}"
    name = "tiny/smoke-dit"
    recipe = smoke(manifests[name], tmp_path, "max_steps=2", preview, name=name)
    run = train_anywhere(recipe, device="cpu").run
    assert probe(run / "preview" / "step2" / "00.png").width == 16
    assert "preview" in (run / "events.jsonl").read_text()
    components = json.loads((Checkpoint.open(run).path / "components.json").read_text())
    assert components["diffusion"]["type"] == "iddpm"


T5 = (
    "text=!replace {type: t5, max_tokens: 8, dim: 16, precision: fp32}",
    "model=!replace {type: pixart, depth: 1, hidden_size: 32, num_heads: 2, caption_channels: 16, "
    "model_max_length: 8, input_size: [1, 4, 4], no_temporal_pos_emb: false}",
)
CLIP = (
    "text=!replace {type: clip, max_tokens: 16, dim: 16}",
    "model=!replace {type: latte, condition: text, caption_channels: 16, depth: 2, "
    "hidden_size: 32, num_heads: 2, input_size: [5, 4, 4]}",
)


@pytest.mark.parametrize(
    ("write", "settings"), [(write_t5, T5), (write_clip, CLIP)], ids=["t5", "clip"]
)
def test_text_encoders_with_weights_run_in_the_loop_and_in_previews(
    write: Callable[[Path], object],
    settings: tuple[str, ...],
    captioned: Path,
    tmp_path: Path,
    kinema: Any,
) -> None:
    outputs, name = tmp_path / "outputs", "tiny/smoke-1.0"
    outputs.mkdir()
    write(outputs / "text")
    vae = write_vae(outputs / "vae.safetensors", recipe=name)
    recipe = smoke(
        captioned, outputs, *settings, f"text_weights='{outputs / 'text'}'", "max_steps=2",
        f"vae_weights='{vae}'", "preview={every: 2, prompts: [a red circle]}", name=name,
    )  # fmt: skip
    run = train_anywhere(recipe, device="cpu").run
    assert probe(run / "preview" / "step2" / "00.mp4").num_frames == 5
    # All moved together: the checkpoint finds autoencoder and text encoder from where it is.
    moved = outputs.rename(tmp_path / "moved")
    code, printed, err = kinema(
        "generate", "--ckpt-path", moved / run.name, "--prompt", "a blue square",
        "--save-dir", tmp_path / "videos", "--num-sampling-steps", 2, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert probe(Path(printed.strip())).num_frames == 5


def test_a_run_goes_on_when_its_text_encoder_has_moved(captioned: Path, tmp_path: Path) -> None:
    write_t5(tmp_path / "t5")

    def recipe(folder: str, steps: int) -> TrainRecipe:
        weights = f"text_weights='{tmp_path / folder}'"
        return smoke(
            captioned, tmp_path / "out", *T5, weights, f"max_steps={steps}", name="tiny/smoke-1.0"
        )

    first = train_anywhere(recipe("t5", 1), device="cpu")
    (tmp_path / "t5").rename(tmp_path / "elsewhere")
    second = train_anywhere(recipe("elsewhere", 2), Start(load=first.run), device="cpu")
    assert (second.run, second.step) == (first.run, 2)
    named = Checkpoint.open(second.run).components["text"]["weights"]
    assert named == str(tmp_path / "elsewhere")
