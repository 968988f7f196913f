"""Starting video models from PixArt weights: what is loaded, reshaped, new, left; and refusals."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.checkpoint.errors import WeightsError
from kinema.checkpoint.pixart_start import (
    StartReport,
    can_start,
    is_pixart,
    preview_start,
    start_from_pixart,
    takes_pixart,
)
from kinema.checkpoint.weights import save_weights
from kinema.config.settings import from_dict
from kinema.models.build import build_transformer
from kinema.models.config import (
    DiTConfig,
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TransformerConfig,
)
from kinema.models.transformer import ClipShape, Transformer

SMALL = {"depth": 2, "hidden_size": 48, "num_heads": 4, "caption_channels": 20}
PIXART = from_dict(PixArtConfig, SMALL | {"model_max_length": 6, "input_size": (1, 8, 8)})
STDIT3 = from_dict(STDiT3Config, SMALL | {"model_max_length": 6})
STDIT2 = from_dict(STDiT2Config, SMALL | {"model_max_length": 6})
STDIT = from_dict(STDiTConfig, SMALL | {"model_max_length": 6, "input_size": (4, 8, 8)})
VIDEO = pytest.mark.parametrize(
    "config", [STDIT3, STDIT2, STDIT], ids=["stdit3", "stdit2", "stdit"]
)


def build(config: TransformerConfig, seed: int = 0, *, noise: float = 0.0) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    model = build_transformer(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


def authors_state(model: Transformer) -> dict[str, Tensor]:
    """As PixArt's authors lay it out: patches without an axis for time, a table of positions."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    return {"pos_embed": model.recomputed_tensors()["pos_embed"]} | state


def write(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"epoch": 3, "state_dict": state}, path)
    return path


@pytest.fixture
def image_model() -> Transformer:
    return build(PIXART, noise=0.1)


@pytest.fixture
def file(image_model: Transformer, tmp_path: Path) -> Path:
    return write(tmp_path / "any-name.pth", authors_state(image_model))


@VIDEO
def test_every_tensor_is_accounted_for(
    config: TransformerConfig, image_model: Transformer, file: Path
) -> None:
    model, untouched = build(config, seed=5), build(config, seed=5)
    report = start_from_pixart(model, file)
    names = image_model.state_dict().keys()
    assert report.left == ("pos_embed",)
    assert report.reshaped == ("x_embedder.proj.weight",)
    assert len(report.loaded) + 1 == len(names)
    assert {*report.loaded, *report.reshaped, *report.new} == model.state_dict().keys()
    assert not {*report.loaded, *report.reshaped} & set(report.new)

    state, fresh = model.state_dict(), untouched.state_dict()
    for name, want in image_model.state_dict().items():
        ours = name.replace("blocks.", "spatial_blocks.") if config is STDIT3 else name
        assert torch.equal(state[ours], want), name
    for name in report.new:
        assert torch.equal(state[name], fresh[name]), name
    assert report.numbers["new"] == sum(state[n].numel() for n in report.new)
    assert report.numbers["loaded"] == sum(state[n].numel() for n in report.loaded)
    assert report.numbers["reshaped"] == 48 * 4 * 4
    assert report.numbers["left"] == 16 * 48


def test_what_is_new_in_each() -> None:
    patterns = {
        STDIT3: ("temporal_blocks.", "fps_embedder.", "rope.", "spatial_blocks."),
        STDIT2: ("blocks.", "t_block_temp.", "rope.", "csize_", "ar_", "fl_", "fps_"),
        STDIT: ("blocks.",),
    }
    for config, beginnings in patterns.items():
        report = start(build(config), authors_state(build(PIXART)))
        assert all(n.startswith(beginnings) for n in report.new)
        in_blocks = [n for n in report.new if n.startswith(("blocks.", "spatial_blocks."))]
        assert all("_temp" in n or "q_norm" in n or "k_norm" in n for n in in_blocks)


def start(model: Transformer, state: dict[str, Tensor]) -> StartReport:
    """Start from tensors that lie in a file."""
    with tempfile.TemporaryDirectory() as folder:
        return start_from_pixart(model, write(Path(folder) / "w.pth", state))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(
    "config",
    [dataclasses.replace(STDIT3, qk_norm=False, input_sq_size=64), STDIT],
    ids=["stdit3", "stdit"],
)
@torch.no_grad()
def test_the_video_model_begins_as_the_image_model(
    config: TransformerConfig, frames: int, image_model: Transformer, file: Path
) -> None:
    """Where positions agree, each frame comes out as the image model has it."""
    model = build(dataclasses.replace(config, **({"space_scale": 1.0} if config is STDIT else {})))
    start_from_pixart(model, file)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, frames, 8, 8, generator=generator)
    y = torch.randn(2, 1, 6, 20, generator=generator)
    t, side = torch.tensor([3.0, 900.0]), torch.full((2,), 64.0)
    shape = ClipShape(torch.full((2,), 24.0), side, side, torch.full((2,), float(frames)))
    video = model.predict(x, t, y, mask=None, x_mask=None, shape=shape)
    images = [
        image_model.predict(x[:, :, i : i + 1], t, y, mask=None, x_mask=None, shape=shape)
        for i in range(frames)
    ]
    want = torch.cat(images, dim=2)
    assert want.std() > 0.05
    torch.testing.assert_close(video, want, atol=2e-5 * float(want.abs().max()), rtol=0)


@VIDEO
@pytest.mark.parametrize("tokens", [4, 6, 9])
def test_stand_in_is_cut_or_its_last_row_repeated(
    config: TransformerConfig, tokens: int, image_model: Transformer, file: Path
) -> None:
    model = build(dataclasses.replace(config, model_max_length=tokens))
    report = start_from_pixart(model, file)
    rows = image_model.state_dict()["y_embedder.y_embedding"]
    got = model.state_dict()["y_embedder.y_embedding"]
    assert torch.equal(got[:6], rows[:tokens])
    assert all(torch.equal(row, rows[-1]) for row in got[6:])
    assert ("y_embedder.y_embedding" in report.reshaped) is (tokens != 6)
    said = {4: "the rest is cut", 6: "", 9: "its last is repeated"}[tokens]
    assert said in str(report)
    assert ("stand-in" in str(report)) is (tokens != 6)


def test_alpha_is_loaded_as_sigma_is_and_said(tmp_path: Path) -> None:
    alpha = dataclasses.replace(PIXART, model_max_length=120)
    path = write(tmp_path / "PixArt-XL-2-512x512.pth", authors_state(build(alpha, noise=0.1)))
    report = start_from_pixart(build(STDIT3), path)
    assert "spatial_blocks.1.mlp.fc2.weight" in report.loaded
    assert "PixArt-alpha, whose blocks are all loaded" in str(report)
    path = write(tmp_path / "PixArt-Sigma.pth", authors_state(build(PIXART)))
    assert "alpha" not in str(start_from_pixart(build(STDIT3), path)).replace(str(tmp_path), "")


def test_what_only_some_image_models_have() -> None:
    ms = authors_state(build(dataclasses.replace(PIXART, size_conditions=True)))
    report = start(build(STDIT3), ms)
    assert [n for n in report.left if n != "pos_embed"] == [
        n for n in ms if "ize_" in n or "ar_" in n
    ]
    model = build(STDIT2)
    report = start(model, ms)
    assert report.left == ("pos_embed",)
    assert torch.equal(
        model.get_parameter("ar_embedder.mlp.0.weight"), ms["ar_embedder.mlp.0.weight"]
    )
    compress = {"kv_compress_layer": [1]}
    settings = SMALL | {"model_max_length": 6, "kv_compress": compress, "qk_norm": True}
    sigma = authors_state(build(from_dict(PixArtConfig, settings), noise=0.1))
    model = build(STDIT3)
    report = start(model, sigma)
    assert {n.rpartition(".")[0] for n in report.left} == {
        "",
        "blocks.1.attn.sr",
        "blocks.1.attn.norm",
    }
    assert torch.equal(
        model.get_parameter("spatial_blocks.0.attn.q_norm.weight"),
        sigma["blocks.0.attn.q_norm.weight"],
    )


def test_half_precision_wrappers_and_other_formats(
    image_model: Transformer, tmp_path: Path
) -> None:
    state = {f"module.{n}": t.half() for n, t in authors_state(image_model).items()}
    path = tmp_path / "weights.safetensors"
    save_weights(path, state)
    model = build(STDIT3)
    assert can_start(model, path)
    report = start_from_pixart(model, path)
    assert report.left == ("module.pos_embed",)
    got = model.get_parameter("spatial_blocks.0.mlp.fc1.weight")
    assert got.dtype == torch.float32
    assert torch.equal(got, state["module.blocks.0.mlp.fc1.weight"].float())


def test_pixart_itself_with_longer_texts(image_model: Transformer, file: Path) -> None:
    model = build(dataclasses.replace(PIXART, model_max_length=9))
    report = start_from_pixart(model, file)
    assert report.new == ()
    assert len(report.reshaped) == 2
    other = build(dataclasses.replace(PIXART, size_conditions=True))
    with pytest.raises(WeightsError, match=r"8 tensors missing from the file \(csize_embedder"):
        start_from_pixart(other, file)
    declared = (r"(csize|ar)_embedder\..*",)
    assert len(start_from_pixart(other, file, allow_new=declared).new) == 8


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 96}, "of another shape"),
        ({"depth": 3}, r"missing from the file \(spatial_blocks.2"),
        ({"depth": 1}, r"unknown to the model \(blocks.1"),
        ({"in_channels": 8}, r"x_embedder.proj.weight \[48, 4, 2, 2\] in the file"),
    ],
)
def test_another_size_is_refused_untouched(
    change: dict[str, Any], message: str, file: Path
) -> None:
    model, untouched = (build(dataclasses.replace(STDIT3, **change), seed=5) for _ in range(2))
    with pytest.raises(WeightsError, match=message):
        start_from_pixart(model, file)
    for name, tensor in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_file_that_lacks_a_tensor(image_model: Transformer) -> None:
    state = authors_state(image_model)
    del state["blocks.1.mlp.fc1.bias"]
    with pytest.raises(WeightsError, match=r"1 tensors missing .*spatial_blocks.1.mlp.fc1.bias"):
        start(build(STDIT3), state)


def test_a_file_with_a_foreign_tensor(image_model: Transformer, tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", authors_state(image_model) | {"lora.a": torch.zeros(3)})
    assert can_start(build(STDIT3), path)
    with pytest.raises(WeightsError, match=r"1 tensors unknown to the model \(lora.a\)"):
        start_from_pixart(build(STDIT3), path)
    report = start_from_pixart(build(STDIT3), path, allow_unexpected=["lora.a"])
    assert report.left == ("pos_embed", "lora.a")


def test_preview_says_the_same_and_reads_nothing(file: Path) -> None:
    with torch.device("meta"):
        nothing = build_transformer(STDIT3)
    report = preview_start(nothing, file)
    assert all(t.is_meta for t in nothing.state_dict().values())
    assert report == start_from_pixart(build(STDIT3), file)


# Telling PixArt from others


def test_only_pixart_is_taken_for_pixart() -> None:
    variants = [
        PIXART,
        dataclasses.replace(PIXART, size_conditions=True),
        from_dict(
            PixArtConfig, SMALL | {"qk_norm": True, "kv_compress": {"kv_compress_layer": [0]}}
        ),
    ]
    for config in variants:
        shapes = {n: t.shape for n, t in authors_state(build(config)).items()}
        assert is_pixart(shapes)
        assert is_pixart({f"module.{n}": s for n, s in shapes.items()})
    dit = from_dict(DiTConfig, {"depth": 1, "hidden_size": 48, "num_heads": 4})
    for other in (STDIT3, STDIT2, STDIT, dit):
        model = build(other)
        assert not is_pixart({n: t.shape for n, t in model.state_dict().items()})
        assert takes_pixart(model) is (other is not dit)
    assert not is_pixart({})
    assert not takes_pixart(torch.nn.Linear(1, 1))


def test_report_is_one_line_with_counts(file: Path) -> None:
    line = str(start_from_pixart(build(STDIT3), file))
    assert "\n" not in line
    assert line.startswith(f"{file}: started from PixArt: loaded 45 tensors (")
    assert "reshaped 1 tensors (768 numbers, x_embedder 1)" in line
    assert "left 1 tensors (768 numbers, pos_embed 1)" in line
    assert "temporal_blocks 34" in line
