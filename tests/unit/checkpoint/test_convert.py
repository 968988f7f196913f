"""Every published form of every network: there and back, and the same forward pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinema.checkpoint.convert import convert, size_in_bytes
from kinema.checkpoint.errors import CheckpointError, WeightsError
from kinema.checkpoint.identify import identify, same_network
from kinema.checkpoint.reader import TensorReader
from kinema.checkpoint.source import TensorSource
from kinema.checkpoint.weights import iterate_tensors, load_released, load_weights, save_weights
from tests.unit.checkpoint.tiny_networks import CONFIGS, DIFFUSERS, forward, network, on_meta

FORMS = [(name, "original") for name in CONFIGS] + [(name, "diffusers") for name in DIFFUSERS]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def saved(module: nn.Module, path: Path) -> Path:
    save_weights(path, module.state_dict())
    return path


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_there_and_back_and_the_same_forward(name: str, form: Any, tmp_path: Path) -> None:
    module = network(name)
    ours = saved(module, tmp_path / "ours.safetensors")
    there = convert(ours, tmp_path / "there", form, config=CONFIGS[name])
    back = convert(tmp_path / "there" / there.files[0].name, tmp_path / "back", "kinema")
    assert equal(dict(iterate_tensors(tmp_path / "back")), module.state_dict())
    again = convert(
        back.files[0], tmp_path / "again" / there.files[0].name, form, config=CONFIGS[name]
    )
    assert again.files[0].read_bytes() == there.files[0].read_bytes()
    assert equal(dict(iterate_tensors(there.files[0])), dict(iterate_tensors(again.files[0])))

    loaded = on_meta(name)
    report = load_released(loaded, there.files[0])
    assert equal(loaded.state_dict(), module.state_dict())
    assert not report.new
    assert set(report.unexpected) == set(there_tables(name, form))
    assert torch.equal(forward(loaded), forward(module))


def there_tables(name: str, form: str) -> list[str]:
    """Position tables in files of the first authors and of Open-Sora."""
    if form != "original" or "vae" in name or name in ("stdit2",) or name.startswith("stdit3"):
        return []
    if name == "latte":
        return ["pos_embed", "temp_embed"]
    if name == "dit" or (name.startswith("pixart") and name != "pixart of videos"):
        return ["pos_embed"]
    if name == "dit of captions":
        return ["pos_embed_spatial", "pos_embed_temporal"]
    return ["pos_embed", "pos_embed_temporal"]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_what_is_written_is_recognised(name: str, form: Any, tmp_path: Path) -> None:
    ours = saved(network(name), tmp_path / "ours.safetensors")
    there = convert(ours, tmp_path / "there", form, config=CONFIGS[name])
    with TensorSource(there.files[0]) as tensors:
        found = identify(tensors.shapes, tensors.dtypes)
    assert found is not None
    assert found.fits, (found.fit, found.unexpected)
    assert same_network(found.config, CONFIGS[name]), found.config
    if form == "diffusers":
        assert found.layout.name == "diffusers" or name == "image vae"


@pytest.mark.parametrize("name", CONFIGS)
def test_position_tables_in_a_file_are_those_computed_here(name: str, tmp_path: Path) -> None:
    module = network(name)
    there = convert(saved(module, tmp_path / "a.safetensors"), tmp_path / "b", "original",
                    config=CONFIGS[name])  # fmt: skip
    written = dict(iterate_tensors(there.files[0]))
    computed = getattr(module, "recomputed_tensors", dict)()
    for table in there_tables(name, "original"):
        ours = {"temp_embed": "pos_embed_temporal"}.get(table, table)
        ours = ours if ours in computed else "pos_embed_spatial"
        assert torch.equal(written[table], computed[ours])


def test_the_first_authors_files(tmp_path: Path) -> None:
    """Shapes and nesting as Meta, Latte's and PixArt's authors published them."""
    keys = {"dit": None, "latte": "ema", "pixart": "state_dict"}
    for name, wrapper in keys.items():
        ours = saved(network(name), tmp_path / f"{name}.safetensors")
        done = convert(ours, tmp_path / f"{name}.pth", "original", config=CONFIGS[name])
        data = torch.load(done.files[0], weights_only=True)
        state = data if wrapper is None else data[wrapper]
        assert wrapper is None or list(data) == [wrapper]
        assert state["x_embedder.proj.weight"].shape == (24, 4, 2, 2)
        assert "pos_embed" in state


def test_diffusers_names_and_values(tmp_path: Path) -> None:
    """Against the names of diffusers' own classes, written down by hand."""
    module = network("pixart with sizes")
    state = module.state_dict()
    convert(saved(module, tmp_path / "a.safetensors"), tmp_path / "p", "diffusers",
            config=CONFIGS["pixart with sizes"])  # fmt: skip
    theirs = dict(iterate_tensors(tmp_path / "p"))
    qkv = state["blocks.1.attn.qkv.weight"].chunk(3)
    keys = state["blocks.1.cross_attn.kv_linear.bias"].chunk(2)
    block = "transformer_blocks.1."
    assert torch.equal(theirs[block + "attn1.to_q.weight"], qkv[0])
    assert torch.equal(theirs[block + "attn1.to_v.weight"], qkv[2])
    assert torch.equal(theirs[block + "attn2.to_k.bias"], keys[0])
    assert torch.equal(theirs[block + "scale_shift_table"], state["blocks.1.scale_shift_table"])
    assert torch.equal(theirs["scale_shift_table"], state["final_layer.scale_shift_table"])
    assert torch.equal(theirs["adaln_single.linear.weight"], state["t_block.1.weight"])
    assert theirs["pos_embed.proj.weight"].shape == (24, 4, 2, 2)
    assert "adaln_single.emb.aspect_ratio_embedder.linear_2.bias" in theirs
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert config["_class_name"] == "PixArtTransformer2DModel"
    assert (config["num_layers"], config["use_additional_conditions"]) == (2, True)

    module = network("dit")
    convert(saved(module, tmp_path / "d.safetensors"), tmp_path / "d", "diffusers",
            config=CONFIGS["dit"])  # fmt: skip
    theirs = dict(iterate_tensors(tmp_path / "d"))
    for i in range(2):
        table = theirs[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"]
        assert torch.equal(table, module.state_dict()["y_embedder.embedding_table.weight"])
    assert {"proj_out_1.weight", "proj_out_2.bias", "pos_embed.proj.bias"} <= set(theirs)


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    """Fine-tuning in diffusers could change one block's timestep embedding alone."""
    convert(saved(network("dit"), tmp_path / "a.safetensors"), tmp_path / "d", "diffusers",
            config=CONFIGS["dit"])  # fmt: skip
    theirs = dict(iterate_tensors(tmp_path / "d"))
    theirs["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_weights(tmp_path / "d" / "diffusion_pytorch_model.safetensors", theirs)
    with pytest.raises(WeightsError, match="should be the same"):
        load_released(on_meta("dit"), tmp_path / "d")


def test_diffusers_without_the_empty_caption(tmp_path: Path) -> None:
    convert(saved(network("pixart"), tmp_path / "a.safetensors"), tmp_path / "p", "diffusers",
            config=CONFIGS["pixart"])  # fmt: skip
    theirs = dict(iterate_tensors(tmp_path / "p"))
    del theirs["caption_projection.y_embedding"]
    path = tmp_path / "newer.safetensors"
    save_weights(path, theirs)
    with pytest.raises(WeightsError, match="no place for the learned empty caption"):
        convert(path, tmp_path / "x", "kinema")
    with pytest.raises(WeightsError, match=r"1 tensors missing .*y_embedder\.y_embedding"):
        load_released(on_meta("pixart"), path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_prefixes_of_wrappers(prefix: str, tmp_path: Path) -> None:
    module = network("pixart")
    state = {prefix + n: t for n, t in module.state_dict().items()}
    weight = state[f"{prefix}x_embedder.proj.weight"]
    state[f"{prefix}x_embedder.proj.weight"] = weight.squeeze(2)
    state[f"{prefix}pos_embed"] = torch.zeros(1, 16, 24)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pth")
    loaded = on_meta("pixart")
    load_released(loaded, tmp_path / "w.pth")
    assert equal(loaded.state_dict(), module.state_dict())
    convert(tmp_path / "w.pth", tmp_path / "k.safetensors", "kinema")
    assert equal(dict(iterate_tensors(tmp_path / "k.safetensors")), module.state_dict())


def ldm_names(name: str) -> str:
    """A few names of Stable Diffusion's first files, by hand: two levels."""
    table = {
        "encoder.down_blocks.0.resnets.0.conv1.weight": "encoder.down.0.block.0.conv1.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias":
            "encoder.down.1.block.0.nin_shortcut.bias",
        "encoder.down_blocks.0.downsamplers.0.conv.weight": "encoder.down.0.downsample.conv.weight",
        "decoder.up_blocks.0.resnets.1.norm2.weight": "decoder.up.1.block.1.norm2.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.bias": "decoder.up.1.upsample.conv.bias",
        "decoder.up_blocks.1.resnets.0.conv1.bias": "decoder.up.0.block.0.conv1.bias",
        "decoder.mid_block.attentions.0.to_out.0.bias": "decoder.mid.attn_1.proj_out.bias",
        "encoder.mid_block.attentions.0.group_norm.bias": "encoder.mid.attn_1.norm.bias",
        "encoder.mid_block.resnets.1.conv2.bias": "encoder.mid.block_2.conv2.bias",
        "decoder.conv_norm_out.weight": "decoder.norm_out.weight",
        "quant_conv.weight": "quant_conv.weight",
    }  # fmt: skip
    return table.get(name, "")


def test_autoencoders_of_the_first_authors(tmp_path: Path) -> None:
    from kinema.checkpoint.released_names import layouts

    module = network("image vae")
    (layout,) = [x for x in layouts(module) if x.name == "first authors"]
    state: dict[str, Tensor] = {}
    for ours, tensor in module.state_dict().items():
        theirs = layout.stored[ours].names[0]
        assert ldm_names(ours) in ("", theirs)
        attention = ".attn_1." in theirs and theirs.endswith("weight") and ".norm." not in theirs
        state[theirs] = tensor[..., None, None] if attention else tensor
    assert state["decoder.mid.attn_1.q.weight"].ndim == 4
    torch.save({"state_dict": state}, tmp_path / "kl.ckpt")
    loaded = on_meta("image vae")
    load_released(loaded, tmp_path / "kl.ckpt")
    assert equal(loaded.state_dict(), module.state_dict())
    assert torch.equal(forward(loaded), forward(module))


def test_old_attention_names_of_the_video_autoencoder(tmp_path: Path) -> None:
    module = network("video vae")
    state = {
        n.replace("to_q", "query")
        .replace("to_out.0", "proj_attn")
        .replace("to_k", "key")
        .replace("to_v", "value"): t
        for n, t in module.state_dict().items()
    }
    assert len(state.keys() - module.state_dict().keys()) == 16
    save_weights(tmp_path / "v.safetensors", state)
    loaded = on_meta("video vae")
    load_released(loaded, tmp_path / "v.safetensors")
    assert equal(loaded.state_dict(), module.state_dict())


def test_dtype_and_shards(tmp_path: Path) -> None:
    module = network("stdit3")
    ours = saved(module, tmp_path / "a.safetensors")
    done = convert(ours, tmp_path / "half", "kinema", dtype="bf16", max_shard_bytes=20_000)
    assert len(done.files) > 3
    assert done.files[-1].name.endswith(".index.json")
    half = dict(iterate_tensors(tmp_path / "half"))
    for name, tensor in module.state_dict().items():
        wanted = tensor if name == "rope.freqs" else tensor.bfloat16()
        assert half[name].dtype == wanted.dtype
        assert torch.equal(half[name], wanted)
    convert(tmp_path / "half", tmp_path / "full.safetensors", "kinema", dtype="fp32")
    assert {t.dtype for _, t in iterate_tensors(tmp_path / "full.safetensors")} == {torch.float32}
    with pytest.raises(WeightsError, match="fp32, bf16, fp16"):
        convert(ours, tmp_path / "x", "kinema", dtype="int8")


def test_a_module_reads_from_any_form_by_its_own_names(tmp_path: Path) -> None:
    module = network("pixart")
    convert(saved(module, tmp_path / "a.safetensors"), tmp_path / "p", "diffusers",
            config=CONFIGS["pixart"])  # fmt: skip
    with TensorReader(tmp_path / "p", like=on_meta("pixart")) as reader:
        for name, tensor in module.state_dict().items():
            assert torch.equal(reader.read(name), tensor)


def test_refusals(tmp_path: Path) -> None:
    ours = saved(network("stdit3"), tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="diffusers has no class for STDiT3"):
        convert(ours, tmp_path / "x", "diffusers")
    with pytest.raises(WeightsError, match="is there already"):
        convert(saved(network("stdit3"), tmp_path / "b.safetensors"), ours, "kinema")
    with pytest.raises(WeightsError, match="the same file"):
        convert(ours, ours, "kinema", overwrite=True)
    with pytest.raises(WeightsError, match="written as"):
        convert(ours, tmp_path / "x.pth", "kinema")
    latte = saved(network("latte"), tmp_path / "l.safetensors")
    with pytest.raises(WeightsError, match="LatteTransformer3DModel is another network"):
        convert(latte, tmp_path / "x", "diffusers")
    with pytest.raises(WeightsError, match="--model NAME"):
        convert(latte, tmp_path / "x", "original")
    with pytest.raises(WeightsError, match="should be the weights of STDiT "):
        convert(latte, tmp_path / "x", "original", config=CONFIGS["stdit"])
    state = network("stdit3").state_dict()
    del state["t_block.1.bias"]
    save_weights(tmp_path / "half.safetensors", state)
    with pytest.raises(WeightsError, match=r"1 missing \(t_block.1.bias\)"):
        convert(tmp_path / "half.safetensors", tmp_path / "x", "kinema")
    save_weights(tmp_path / "other.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(WeightsError, match="no network that is known here"):
        convert(tmp_path / "other.safetensors", tmp_path / "x", "kinema")
    assert not (tmp_path / "x").exists()


def test_overwriting_is_asked_for(tmp_path: Path) -> None:
    one, two = network("stdit3", 1), network("stdit3", 2)
    target = tmp_path / "t.safetensors"
    convert(saved(one, tmp_path / "1.safetensors"), target, "kinema")
    convert(saved(two, tmp_path / "2.safetensors"), target, "kinema", overwrite=True)
    loaded = on_meta("stdit3")
    load_weights(loaded, target)
    assert equal(loaded.state_dict(), two.state_dict())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    import errno

    ours = saved(network("pixart"), tmp_path / "a.safetensors")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        convert(ours, tmp_path / "x" / "m.pth", "original", config=CONFIGS["pixart"])
    assert list((tmp_path / "x").iterdir()) == []


def test_a_command_line_beside_the_tensors_is_no_danger(tmp_path: Path) -> None:
    """Latte's files hold the Namespace of the training program."""
    import argparse

    module = network("latte")
    torch.save(
        {"ema": module.state_dict(), "args": argparse.Namespace(lr=1e-4, name="x")},
        tmp_path / "ucf.pt",
    )
    loaded = on_meta("latte")
    load_released(loaded, tmp_path / "ucf.pt")
    assert equal(loaded.state_dict(), module.state_dict())


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5_000_000_000), ("1.5MiB", 1_572_864), (" 10 KB ", 10_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


def test_no_size() -> None:
    with pytest.raises(WeightsError, match="5GB or 500MB"):
        size_in_bytes("much")


CONVERT_IN_A_PROCESS = """
import resource, sys
from kinema.checkpoint.convert import convert
convert(sys.argv[1], sys.argv[2] + "/warm.safetensors", "kinema")  # imports, thread pools
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[3], sys.argv[2] + "/big.safetensors", "kinema", dtype="bf16")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    from kinema.models.build import build_transformer
    from kinema.models.config import STDiT3Config
    from tests.unit.checkpoint.test_weights import write_sparse

    with torch.device("meta"):
        state = build_transformer(STDiT3Config(depth=2)).half().state_dict()
    size = write_sparse(tmp_path / "big.safetensors", state)
    assert size > 180e6
    small = saved(network("stdit3"), tmp_path / "small.safetensors")
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CONVERT_IN_A_PROCESS, small, tmp_path / "out",
         tmp_path / "big.safetensors"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown = int(done.stdout)
    assert grown < 80e6, f"{grown / 1e6:.0f} MB for {size / 1e6:.0f} MB of weights"
