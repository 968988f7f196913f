"""`kinema generate` from a checkpoint on disk to files, and every way in which it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kinema import Pipeline
from kinema.checkpoint.run import save_checkpoint
from kinema.checkpoint.weights import save_weights
from kinema.cli.main import main
from kinema.config.errors import KinemaError
from kinema.config.settings import to_dict
from kinema.media.probe import probe
from kinema.models.build import build_transformer
from tests.unit.generation.tiny import tiny_config, tiny_parts


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run folder with one checkpoint and its autoencoder beside it."""
    config = tiny_config(vae_weights="../../vae.safetensors")
    parts = tiny_parts(config)
    run = tmp_path / "outputs" / "000-tiny"
    run.mkdir(parents=True)
    save_weights(tmp_path / "outputs" / "vae.safetensors", parts.vae.state_dict())
    weights = parts.model.state_dict()
    averaged = {name: tensor * 0.9 for name, tensor in weights.items()}
    saved = save_checkpoint(
        run, 0, 5, model=weights, ema=averaged, state={}, components=to_dict(config)
    )
    return saved.path


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


def test_prompts_become_videos_with_sidecars(checkpoint: Path, tmp_path: Path, kinema: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boat\n\n  a fish  \n")
    out = tmp_path / "out"
    code, printed, err = kinema(
        "generate", "--ckpt-path", checkpoint, "--prompt", "a kite", "--prompt-path", prompts,
        "--num-samples", 2, "--batch-size", 4, "--seed", 7, "--save-dir", out,
        "--num-sampling-steps", 2,
    )  # fmt: skip
    assert code == 0, err
    names = [Path(line).name for line in printed.splitlines()]
    assert names == [f"a-{p}-seed7{k}.mp4" for p in ("kite", "boat", "fish") for k in ("", "-2")]
    for name in names:
        assert probe(out / name).num_frames == 17
        about = json.loads((out / name).with_suffix(".json").read_text())
        assert about["pipeline"]["weights"] == "ema"
        assert about["pipeline"]["step"] == 5
        assert about["request"]["num_sampling_steps"] == 2
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    assert (out / names[0]).read_bytes() != (out / names[1]).read_bytes()


def test_run_folder_and_python_give_the_same_video(
    checkpoint: Path, tmp_path: Path, kinema: Any
) -> None:
    code, printed, _ = kinema(
        "generate", "--ckpt-path", checkpoint.parent, "--prompt", "a kite", "--seed", 3,
        "--num-frames", "2s", "--size", "32x32", "--save-dir", tmp_path,
    )  # fmt: skip
    assert code == 0
    pipeline = Pipeline.from_pretrained(checkpoint)
    path = pipeline.generate("a kite", seconds=2, seed=3).save(tmp_path / "python.mp4")
    assert path.read_bytes() == Path(printed.strip()).read_bytes()


def test_averaged_or_not(checkpoint: Path) -> None:
    ema, plain = (Pipeline.from_pretrained(checkpoint, ema=e) for e in (True, False))
    request = ema.request("a kite")
    assert (ema.latents([request]) - plain.latents([request])).abs().max() > 1e-4


def test_an_existing_video_stays(checkpoint: Path, tmp_path: Path, kinema: Any) -> None:
    call = ("generate", "--ckpt-path", checkpoint, "--prompt", "a kite", "--save-dir", tmp_path,
            "--num-sampling-steps", 1, "--num-frames", 1)  # fmt: skip
    names = [Path(kinema(*call)[1].strip()).name for _ in range(2)]
    assert names == ["a-kite-seed42.png", "a-kite-seed42-again2.png"]


def test_named_sizes_are_width_to_height(checkpoint: Path, tmp_path: Path, kinema: Any) -> None:
    code, printed, err = kinema(
        "generate", "--ckpt-path", checkpoint, "--prompt", "a", "--save-dir", tmp_path,
        "--resolution", "144p", "--aspect-ratio", "16:9", "--num-frames", 1,
        "--num-sampling-steps", 1,
    )  # fmt: skip
    assert code == 0, err
    info = probe(Path(printed.strip()))
    assert (info.width, info.height) == (256, 144)
    assert "was not trained on 256x144" in err


def test_long_prompts_say_what_is_lost(checkpoint: Path, tmp_path: Path, kinema: Any) -> None:
    code, _, err = kinema(
        "generate", "--ckpt-path", checkpoint, "--save-dir", tmp_path, "--num-frames", 1,
        "--prompt", "one two three four five six seven eight nine",
    )  # fmt: skip
    assert code == 0
    assert "this is lost: eight nine" in err


REFUSED = [
    (("--prompt", " "), "prompt is empty"),
    ((), "no prompt"),
    (("--prompt", "a", "--size", "33x32"), "width 33 is not a multiple of 4"),
    (("--prompt", "a", "--size", "33"), "'33' is no size"),
    (("--prompt", "a", "--num-frames", "50"), "34 or 51 frames"),
    (("--prompt", "a", "--num-frames", "4 m"), "'4 m' is no length"),
    (("--prompt", "a", "--num-frames", "3s"), "17 frames (2 s) or 34 frames (4 s)"),
    (("--prompt", "a", "--resolution", "240q"), "did you mean '240p'"),
    (("--prompt", "a", "--resolution", "240p", "--aspect-ratio", "7:5"), "width:height"),
    (("--prompt", "a", "--aspect-ratio", "16:9"), "needs --resolution"),
    (("--prompt", "a", "--seed", "-1"), "seed is -1"),
    (("--prompt", "a", "--cfg-scale", "-1"), "cfg_scale is -1"),
    (("--prompt", "a", "--dtype", "fp8"), "dtype is 'fp8'"),
    (("--prompt", "a", "--vae", "nowhere/vae.safetensors"), "nowhere/vae.safetensors"),
    (("--prompt", "a", "--size", "80000x80000"), "is free on cpu"),
    (("--prompt-path", "none.txt"), "none.txt"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_bad_requests_are_refused_before_weights_are_read(
    arguments: tuple[str, ...],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    kinema: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name in ("fill_model", "fill_vae"):
        monkeypatch.setattr(f"kinema.generation.parts.CheckpointSource.{name}", _never)
    out = tmp_path / "out"
    code, printed, err = kinema(
        "generate", "--ckpt-path", checkpoint, "--save-dir", out, *arguments
    )
    assert code != 0
    assert message in err
    assert "Traceback" not in err
    assert not printed
    assert not list(out.glob("*"))


def _never(*_: object, **__: object) -> None:
    raise AssertionError("weights were read")


def test_checkpoints_that_cannot_generate(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(KinemaError, match="no such folder"):
        Pipeline.from_pretrained(tmp_path / "nowhere")

    (checkpoint.parents[1] / "vae.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(KinemaError, match="autoencoder's weights are missing") as caught:
        Pipeline.from_pretrained(checkpoint)
    assert caught.value.where is not None
    assert caught.value.where.endswith("vae.safetensors")
    Pipeline.from_pretrained(checkpoint, vae=tmp_path / "moved.safetensors").load()

    weights = checkpoint / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(KinemaError, match="not whole"):
        Pipeline.from_pretrained(checkpoint, vae=tmp_path / "moved.safetensors")
    # The other section is untouched.
    Pipeline.from_pretrained(checkpoint, vae=tmp_path / "moved.safetensors", ema=False).load()


def test_a_checkpoint_without_averaged_weights_says_so(tmp_path: Path) -> None:
    config = tiny_config(vae_weights=str(tmp_path))
    run = tmp_path / "run"
    run.mkdir()
    model = build_transformer(config.model).state_dict()
    path = save_checkpoint(run, 0, 1, model=model, state={}, components=to_dict(config)).path
    with pytest.raises(KinemaError, match="--no-ema"):
        Pipeline.from_pretrained(path)


def test_an_autoencoder_is_no_pipeline(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    weights = {"a": torch.zeros(1)}
    components = {"vae": {"config": to_dict(tiny_config().vae.config)}}
    path = save_checkpoint(run, 0, 1, model=weights, state={}, components=components).path
    with pytest.raises(KinemaError, match="no checkpoint of a text-to-video model"):
        Pipeline.from_pretrained(path)


def test_weights_of_another_model_are_refused_with_counts(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_weights(other, {"conv.weight": torch.zeros(3)})
    with pytest.raises(KinemaError, match=r"conv\.weight"):
        Pipeline.from_pretrained(checkpoint, vae=other).load()
