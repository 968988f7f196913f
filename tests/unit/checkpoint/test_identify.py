"""What a file of weights is told to be, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.checkpoint.errors import WeightsError
from kinema.checkpoint.examine import described, examine
from kinema.checkpoint.identify import Identity, identify, same_network
from kinema.checkpoint.run import resolve_weights, save_checkpoint
from kinema.checkpoint.weights import load_released, save_weights
from kinema.config.settings import to_dict
from kinema.generation.released import RELEASED, find_released
from kinema.models.build import build_transformer
from kinema.models.config import STDiT3Config
from tests.unit.checkpoint.tiny_networks import CONFIGS, network, on_meta


def identified(shapes: Mapping[str, torch.Size]) -> Identity:
    found = identify(shapes, dict.fromkeys(shapes, torch.float32))
    assert found is not None
    return found


@pytest.mark.parametrize("released", RELEASED, ids=lambda r: r.name)
def test_released_networks_are_known_by_their_shapes(released: Any) -> None:
    """With the position tables of the published file, where it has any."""
    with torch.device("meta"):
        model = build_transformer(released.config.model)
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    shapes |= {n: t.shape for n, t in model.recomputed_tensors().items()}
    found = identified(shapes)
    assert found.fits
    names = [r.name for r in RELEASED if same_network(r.config.model, found.config, found.told)]
    assert released.name in names
    if found.told:
        sizes = {find_released(n).config.model.input_size for n in names}
        assert sizes == {released.config.model.input_size}
    assert {find_released(n).generation for n in names} == {released.generation}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_read_off(name: str) -> None:
    found = identified({n: t.shape for n, t in on_meta(name).state_dict().items()})
    assert found.fits
    assert same_network(found.config, CONFIGS[name])


def test_other_sizes_than_the_released(tmp_path: Path) -> None:
    config = STDiT3Config(
        depth=3, hidden_size=48, num_heads=4, mlp_ratio=2.0, in_channels=16, patch_size=(2, 4, 4),
        pred_sigma=False, caption_channels=7, model_max_length=9, qk_norm=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = build_transformer(config)
    found = identified({n: t.shape for n, t in model.state_dict().items()})
    assert found.config == config


def test_what_does_not_fit_is_listed() -> None:
    shapes = {n: t.shape for n, t in on_meta("stdit3").state_dict().items()}
    del shapes["spatial_blocks.1.mlp.fc1.bias"]
    shapes["strange"] = torch.Size([3])
    shapes["temporal_blocks.0.attn.proj.bias"] = torch.Size([25])
    found = identified(shapes)
    assert not found.fits
    assert found.fit.missing == ("spatial_blocks.1.mlp.fc1.bias",)
    assert found.unexpected == ("strange",)
    assert found.fit.wrong_shape == (
        "temporal_blocks.0.attn.proj.bias [25] in the file, [24] here",
    )


def test_half_a_model_is_not_guessed() -> None:
    shapes = {n: t.shape for n, t in on_meta("stdit3").state_dict().items()}
    del shapes["x_embedder.proj.weight"]
    assert identify(shapes, dict.fromkeys(shapes, torch.float32)) is None
    assert identify({}, {}) is None


def test_integers_in_place_of_numbers() -> None:
    shapes = {n: t.shape for n, t in on_meta("stdit").state_dict().items()}
    kinds = dict.fromkeys(shapes, torch.float32) | {"blocks.0.attn.qkv.weight": torch.int8}
    found = identify(shapes, kinds)
    assert found is not None
    assert not found.fits
    assert "torch.int8 in the file" in found.fit.wrong_kind[0]


def test_t5_and_clip_from_transformers_themselves() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        t5 = transformers.T5EncoderModel(
            transformers.T5Config(
                d_model=16, d_ff=40, d_kv=64, num_heads=2, num_layers=2, vocab_size=30,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
        clip = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2,
                vocab_size=30,
            )
        )  # fmt: skip
    for model, title in ((t5, "T5 v1.1 text encoder, 2 layers, width 16"),
                         (clip, "CLIP text encoder, 2 layers, width 16")):  # fmt: skip
        shapes = {n: t.shape for n, t in model.state_dict().items()}
        if "text_model.final_layer_norm.weight" not in shapes and title.startswith("CLIP"):
            shapes = {f"text_model.{n}": s for n, s in shapes.items()}  # as files have it
        found = identified(shapes)
        assert found.title == title
        assert found.fits, (found.fit.missing, found.unexpected)
        broken = dict(list(shapes.items())[:-1])
        assert not identified(broken).fits


def test_a_file_with_a_decoder_is_a_text_encoder_as_well() -> None:
    shapes = {
        "shared.weight": torch.Size([30, 16]),
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.Size([16, 16]),
        "lm_head.weight": torch.Size([30, 16]),
    }
    block = "encoder.block.0.layer."
    for part in "qkvo":
        shapes[f"{block}0.SelfAttention.{part}.weight"] = torch.Size([16, 16])
    shapes[f"{block}0.SelfAttention.relative_attention_bias.weight"] = torch.Size([32, 2])
    shapes[f"{block}0.layer_norm.weight"] = torch.Size([16])
    for part, size in (("wi", [24, 16]), ("wo", [16, 24])):
        shapes[f"{block}1.DenseReluDense.{part}.weight"] = torch.Size(size)
    shapes[f"{block}1.layer_norm.weight"] = torch.Size([16])
    shapes["encoder.final_layer_norm.weight"] = torch.Size([16])
    found = identified(shapes)
    assert found.title == "T5 text encoder, 1 layers, width 16"
    assert found.fits
    for needed in ("shared.weight", f"{block}1.DenseReluDense.wi.weight"):
        half = {n: s for n, s in shapes.items() if n != needed}
        assert identify(half, dict.fromkeys(half, torch.float32)) is None


def checkpoint(run: Path, components: dict[str, Any], name: str = "stdit3") -> Path:
    state = network(name).state_dict()
    return save_checkpoint(run, 0, 1, model=state, ema=state, state={}, components=components).path


def test_a_checkpoint_of_ours(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "run", {"model": to_dict(CONFIGS["stdit3"])})
    findings = examine(folder)
    assert [f.section for f in findings] == ["model", "ema"]
    assert all(f.fits for f in findings)
    assert examine(tmp_path / "run") == findings
    assert described(folder) == CONFIGS["stdit3"]

    other = checkpoint(tmp_path / "other", {"model": to_dict(CONFIGS["pixart"])})
    assert examine(other)[0].problem is not None
    assert "describes PixArt" in str(examine(other)[0].problem)

    (folder / "ema.safetensors").write_bytes(b"cut")
    whole, torn = examine(folder)
    assert whole.fits
    assert not torn.fits
    assert "ema.safetensors has 3 of" in str(torn.problem)


def test_a_checkpoint_of_an_autoencoder(tmp_path: Path) -> None:
    components = {"vae": {"config": to_dict(CONFIGS["video vae"])}}
    folder = checkpoint(tmp_path / "run", components, "video vae")
    assert described(folder) == CONFIGS["video vae"]
    assert all(f.fits for f in examine(folder))


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    from kinema.checkpoint.convert import convert

    for part, name in (("transformer", "pixart"), ("vae", "image vae")):
        save_weights(tmp_path / f"{part}.safetensors", network(name).state_dict())
        convert(tmp_path / f"{part}.safetensors", tmp_path / "pipe" / part, "diffusers",
                config=CONFIGS[name])  # fmt: skip
    (tmp_path / "pipe" / "text_encoder").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({}))
    found = examine(tmp_path / "pipe")
    assert [f.fits for f in found] == [True, True, False]
    assert "no weights under a known name" in str(found[2].problem)
    assert described(tmp_path / "pipe") is None


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_checkpoint_of_open_soras_training(kind: str, tmp_path: Path) -> None:
    """Its folders have the names of ours, and the shards in `model/`."""
    folder = tmp_path / "outputs" / "epoch7-global_step30000"
    (folder / "model").mkdir(parents=True)
    state = network("stdit").state_dict()
    if kind == "safetensors":
        save_weights(folder / "model" / "model.safetensors", state, max_shard_bytes=20_000)
    else:
        names = list(state)
        weight_map = {}
        for i, part in enumerate((names[::2], names[1::2])):
            file = f"pytorch_model-0000{i}.bin"
            torch.save({n: state[n] for n in part}, folder / "model" / file)
            weight_map |= dict.fromkeys(part, file)
        index = folder / "model" / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    (found,) = examine(folder)
    assert found.fits
    assert resolve_weights(folder) == folder
    loaded = on_meta("stdit")
    load_released(loaded, folder)
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        examine(tmp_path / "gone.pth")
    save_weights(tmp_path / "other.safetensors", {"a.weight": torch.zeros(2)})
    (found,) = examine(tmp_path / "other.safetensors")
    assert not found.fits
    assert found.what.startswith("no network that is known here (1 tensors: a.weight")
    save_weights(
        tmp_path / "flux.safetensors",
        {"double_blocks.0.a": torch.zeros(1), "single_blocks.0.a": torch.zeros(1)},
    )
    assert "MMDiT" in examine(tmp_path / "flux.safetensors")[0].what
