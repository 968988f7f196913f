"""Training that begins with the weights of an image model; and the image models that train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.checkpoint.run import Checkpoint
from kinema.checkpoint.weights import iterate_tensors
from kinema.cli.main import main
from kinema.config.errors import KinemaError
from kinema.config.settings import from_dict
from kinema.models.build import build_transformer
from kinema.models.config import DiTConfig, PixArtConfig
from kinema.telemetry.run_log import read_log
from kinema.training.run import train
from kinema.training.start import Start
from tests.integration.train_fixtures import smoke, write_classes, write_clips

SMALL = {"depth": 1, "hidden_size": 32, "num_heads": 2}
STILL = ("max_steps=1", "optim.lr=1e-12", "optim.weight_decay=0")
"""A step that changes nothing that could be seen."""


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("world"), count=8)


@pytest.fixture(scope="module")
def classes(captioned: Path) -> Path:
    return write_classes(captioned, classes=10)


def write_authors_file(path: Path, config: PixArtConfig | DiTConfig) -> dict[str, Tensor]:
    """Random weights as PixArt's or DiT's authors lay them out; returns them by name."""
    generator = torch.Generator().manual_seed(0)
    model = build_transformer(config, generator)
    state = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict().items()
    }
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    tables = list(model.recomputed_tensors().values())
    in_file = {"pos_embed": tables[0]} | state
    torch.save({"state_dict": in_file} if isinstance(config, PixArtConfig) else in_file, path)
    return state


def trained(run: Path) -> dict[str, Tensor]:
    return dict(iterate_tensors(Checkpoint.open(run).path))


@pytest.mark.parametrize("name", ["tiny/smoke", "tiny/smoke-1.1", "tiny/smoke-1.0"])
def test_video_models_start_from_pixart(
    name: str,
    captioned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "PixArt-Sigma-XL-2-512-MS.pth"
    model = smoke(captioned, tmp_path, name=name).model
    assert model is not None
    settings = {key: getattr(model, key) for key in ("depth", "hidden_size", "num_heads")}
    settings |= {"caption_channels": 16, "model_max_length": 20, "input_size": (1, 4, 4)}
    state = write_authors_file(file, from_dict(PixArtConfig, settings))
    arguments = [
        "train", name, "--data-path", captioned, "--outputs", tmp_path / "outputs",
        "--device", "cpu", "--ckpt-path", file, "--vae_weights", "random",
        "tracking.tensorboard=false", "model.pred_sigma=true", *STILL,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["kinema", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    printed, said = capfd.readouterr()
    assert not caught.value.code, said
    run = Path(printed.strip())
    events = (run / "events.jsonl").read_text()
    for text in (said, events):
        for words in ("started from PixArt: loaded", "reshaped 2", "left 1", "the rest is cut"):
            assert words in text

    weights = trained(run)
    assert torch.equal(weights.pop("y_embedder.y_embedding"), state["y_embedder.y_embedding"][:8])
    for theirs in state.keys() - {"y_embedder.y_embedding"}:
        ours = theirs.replace("blocks.", "spatial_blocks.") if name == "tiny/smoke" else theirs
        got = weights[ours]
        torch.testing.assert_close(got, state[theirs].view_as(got), atol=1e-6, rtol=0, msg=ours)


def test_command_that_shows_a_start_and_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def kinema(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kinema", "weights", "start", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    file, save = tmp_path / "image.pth", tmp_path / "begun.safetensors"
    settings = SMALL | {"caption_channels": 16, "model_max_length": 8, "input_size": (1, 4, 4)}
    state = write_authors_file(file, from_dict(PixArtConfig, settings))
    small = ("--recipe", "tiny/smoke", "model.pred_sigma=true")
    code, out, _ = kinema(file, *small)
    assert code == 0
    assert out.count("\n") == 1
    assert ", reshaped 1 tensors (512 numbers, x_embedder 1), new " in out
    assert [p.name for p in tmp_path.iterdir()] == [file.name]

    code, out, err = kinema(file, *small, "--names", "--save", save)
    assert code == 0, err
    assert "\nnew:\n  rope.freqs\n" in out
    assert "\nleft:\n  pos_embed\n" in out
    weights = dict(iterate_tensors(save))
    assert torch.equal(weights["spatial_blocks.0.mlp.fc2.weight"], state["blocks.0.mlp.fc2.weight"])
    assert not weights["temporal_blocks.0.mlp.fc2.weight"].any()
    assert len(weights) == len([n for n in out.splitlines() if n.startswith("  ")]) - 1  # pos_embed

    code, _, err = kinema(file, *small, "--save", save)
    assert code == 1
    assert "is there already" in err
    code, _, err = kinema(file, *small, "--save", save, "--overwrite", "seed=7")
    assert code == 0, err
    name = "temporal_blocks.0.attn.qkv.weight"  # new: drawn from the recipe's seed
    assert not torch.equal(dict(iterate_tensors(save))[name], weights[name])
    code, _, err = kinema(file, "--recipe", "tiny/smoke-dit")
    assert code == 1
    assert "'dit' does not start from PixArt" in err
    code, _, err = kinema(file, "--recipe", "tiny/smoke", "model.depth=2")
    assert code == 1
    assert "spatial_blocks.1" in err


def test_dit_starts_from_its_authors_file(classes: Path, tmp_path: Path) -> None:
    file = tmp_path / "DiT-XL-2-256x256.pt"
    settings = SMALL | {"condition": "label_10", "input_size": (1, 4, 4)}
    state = write_authors_file(file, from_dict(DiTConfig, settings))
    recipe = smoke(classes, tmp_path, *STILL, name="tiny/smoke-dit")
    weights = trained(train(recipe, Start(ckpt_path=file), device="cpu").run)
    for name, want in state.items():
        torch.testing.assert_close(weights[name], want.view_as(weights[name]), atol=1e-6, rtol=0)

    # More classes than the file has vectors for.
    other = smoke(
        classes, tmp_path, *STILL, "model.condition=label_11", "text.num_classes=11",
        name="tiny/smoke-dit",
    )  # fmt: skip
    with pytest.raises(KinemaError, match=r"embedding_table.weight \[11, 32\] in the file"):
        train(other, Start(ckpt_path=file), device="cpu")


MODELS = {
    "latte": "{type: latte, condition: label_10, depth: 2, hidden_size: 32}",
    "dit-video": "{type: dit, condition: label_10, no_temporal_pos_emb: false, hidden_size: 32}",
    "pixart-ms": "{type: pixart, size_conditions: true, input_size: [1, 4, 4], hidden_size: 48}",
    "pixart-sigma": "{type: pixart, qk_norm: true, kv_compress: {kv_compress_layer: [0]}, "
    "input_size: [1, 4, 4], hidden_size: 32}",
}


@pytest.mark.parametrize("kind", MODELS)
def test_image_models_and_latte_train(
    kind: str, captioned: Path, classes: Path, tmp_path: Path
) -> None:
    by_class = "label" in MODELS[kind]
    captions = "" if by_class else ", caption_channels: 16, model_max_length: 8"
    depth = "" if "depth" in MODELS[kind] else ", depth: 1"
    recipe = smoke(
        classes if by_class else captioned, tmp_path, "max_steps=2", "optim.lr=1e-2",
        f"model=!replace {MODELS[kind][:-1]}, num_heads: 2{depth}{captions}}}",
        name="tiny/smoke-dit" if by_class else "tiny/smoke-1.0",
    )  # fmt: skip
    before = build_transformer(recipe.model)  # type: ignore[arg-type]
    run = train(recipe, device="cpu").run
    records: list[dict[str, Any]] = list(read_log(run))
    assert len(records) == 2
    for record in records:
        assert record["loss"] == pytest.approx(record["mse"] + record["vb"])
        assert record["loss"] > 0
    weights = trained(run)
    assert weights.keys() == before.state_dict().keys()
    assert weights["final_layer.linear.weight"].any()  # began as zero
