"""`kinema weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kinema.checkpoint.run import save_checkpoint
from kinema.checkpoint.weights import iterate_tensors, load_released, save_weights
from kinema.cli.main import app
from kinema.config.errors import KinemaError
from kinema.config.settings import to_dict
from tests.unit.checkpoint.tiny_networks import CONFIGS, network, on_meta


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["weights", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run of ours whose average differs from the weights."""
    save_checkpoint(
        tmp_path / "run", 0, 1, state={},
        model=network("pixart with sizes", 1).state_dict(),
        ema=network("pixart with sizes", 2).state_dict(),
        components={"model": to_dict(CONFIGS["pixart with sizes"])},
    )  # fmt: skip
    return tmp_path / "run"


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("form", ["original", "diffusers", "kinema"])
def test_a_run_of_ours_into_every_form(form: str, ema: bool, trained: Path, tmp_path: Path) -> None:
    """What its tensors do not tell (scale of positions, heads) is in its components.json."""
    text = run("convert", trained, tmp_path / "x", "--to", form, *(["--ema"] if ema else []))
    assert text.startswith("PixArt-alpha with size conditions, depth 2")
    file = Path(text.splitlines()[-1]).parent
    module = on_meta("pixart with sizes")
    load_released(module, next(p for p in file.iterdir() if p.name != "config.json"))
    wanted = network("pixart with sizes", 2 if ema else 1).state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in module.state_dict().items())


def test_options(trained: Path, tmp_path: Path) -> None:
    run("convert", trained, tmp_path / "x", "--to", "kinema", "--dtype", "fp16",
        "--max-shard-size", "20KB")  # fmt: skip
    assert (tmp_path / "x" / "model.safetensors.index.json").is_file()
    assert {t.dtype for _, t in iterate_tensors(tmp_path / "x")} == {torch.float16}
    with pytest.raises(KinemaError, match="is there already"):
        run("convert", trained, tmp_path / "x", "--to", "kinema")
    run("convert", trained, tmp_path / "x", "--to", "kinema", "--overwrite")
    assert {t.dtype for _, t in iterate_tensors(tmp_path / "x")} == {torch.float32}
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["model.safetensors"]


def test_what_cannot_be(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(KinemaError, match="kinema, original, diffusers"):
        run("convert", trained, tmp_path / "x", "--to", "onnx")
    with pytest.raises(KinemaError, match="says itself what it is"):
        run("convert", trained, tmp_path / "x", "--to", "kinema", "--model", "opensora-1.2")
    file = tmp_path / "w.safetensors"
    save_weights(file, network("stdit").state_dict())
    with pytest.raises(KinemaError, match="--model NAME"):
        run("convert", file, tmp_path / "x", "--to", "original")
    with pytest.raises(KinemaError, match=r"not those of opensora-1\.0"):
        run("convert", file, tmp_path / "x", "--to", "original", "--model", "opensora-1.0")


def test_a_released_size_is_recognised(tmp_path: Path, monkeypatch: Any) -> None:
    """Settings that a file does not tell come from the table when only one checkpoint fits."""
    from dataclasses import replace

    from kinema.generation import released
    from kinema.generation.config import TextComponent
    from kinema.models.config import HashTextConfig

    like = released.find_released("opensora-1.0")
    text = TextComponent(config=HashTextConfig(dim=10, max_tokens=6))
    config = replace(like.config, model=CONFIGS["stdit"], text=text)
    entry = replace(like, name="tiny", config=config)
    other = replace(
        entry,
        name="other",
        config=replace(config, model=replace(CONFIGS["stdit"], space_scale=1.0)),
    )
    file = tmp_path / "w.safetensors"
    save_weights(file, network("stdit").state_dict())
    monkeypatch.setattr(released, "RELEASED", (entry,))
    assert "model.pth" in run("convert", file, tmp_path / "x", "--to", "original")
    monkeypatch.setattr(released, "RELEASED", (entry, other))
    with pytest.raises(KinemaError, match="--model NAME"):
        run("convert", file, tmp_path / "y", "--to", "original")
    run("convert", file, tmp_path / "y", "--to", "original", "--model", "other")
    vae = tmp_path / "v.safetensors"
    save_weights(vae, network("image vae").state_dict())
    assert "config.json is not written" in run("convert", vae, tmp_path / "v", "--to", "diffusers")
    one, two = (dict(iterate_tensors(tmp_path / n / "model.pth")) for n in "xy")
    assert not torch.equal(one["pos_embed"], two["pos_embed"])
    said = run("convert", tmp_path / "y" / "model.pth", tmp_path / "z", "--to", "kinema")
    assert "computed where it is needed: pos_embed, pos_embed_temporal" in said


def test_fetch_says_what_is_missing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(KinemaError, match=r"2 files are missing(.|\n)*maxin-cn/Latte: ucf101\.pt"):
        run("fetch", "latte-xl2-ucf101", "--offline")


def test_fetch_downloads(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("huggingface_hub")
    from tests.unit.checkpoint.loopback_hub import Hub

    hub = Hub()
    hub.files = {
        "maxin-cn/Latte": {"ucf101.pt": b"weights"},
        "stabilityai/sd-vae-ft-ema": {"diffusion_pytorch_model.safetensors": b"more"},
    }
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub.serving():
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        lines = run("fetch", "latte-xl2-ucf101").splitlines()
    places = {line.split()[0]: Path(line.split()[1]) for line in lines}
    assert places["model"].read_bytes() == b"weights"
    assert places["vae"].read_bytes() == b"more"


def test_extra_tensors_are_left_out_if_asked(tmp_path: Path) -> None:
    """What is missing cannot be asked for: there is nothing to write."""
    state = network("stdit2").state_dict()
    save_weights(tmp_path / "a.safetensors", state | {"lora.a": torch.ones(2)})
    command = ["convert", tmp_path / "a.safetensors", tmp_path / "x", "--to", "kinema"]
    with pytest.raises(KinemaError, match=r"1 unknown \(lora\.a\)"):
        run(*command)
    result = CliRunner().invoke(
        app, ["weights", *map(str, command), "--allow-unexpected", r"lora\..*"]
    )
    assert result.exit_code == 0, result.output
    assert "1 tensors left out: lora.a" in result.stderr
    written = dict(iterate_tensors(tmp_path / "x"))
    assert written.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())
    del state["blocks.0.attn.qkv.bias"]
    save_weights(tmp_path / "b.safetensors", state)
    with pytest.raises(KinemaError, match=r"1 missing \(blocks\.0"):
        run("convert", tmp_path / "b.safetensors", tmp_path / "y", "--to", "kinema",
            "--allow-unexpected", ".*")  # fmt: skip
