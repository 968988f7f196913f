"""`kinema generate --model NAME` from files in the forms they are published in (tiny ones)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kinema.checkpoint.convert import convert
from kinema.checkpoint.places import HubFiles
from kinema.checkpoint.weights import save_weights
from kinema.cli.main import app
from kinema.config.errors import KinemaError
from kinema.generation import released as table
from kinema.generation.config import PipelineConfig, TextComponent
from kinema.generation.parts import Parts
from kinema.generation.pipeline import Pipeline
from kinema.generation.released import Released, find_released
from kinema.models.build import build_text_encoder, build_transformer
from kinema.models.config import T5TextConfig
from tests.unit.checkpoint.loopback_hub import Hub
from tests.unit.generation.tiny import FAMILIES, prompts_of, tiny_config, tiny_parts
from tests.unit.models.text_folders import write_t5

LIKE = {
    "stdit3": "opensora-1.2",
    "stdit2": "opensora-1.1",
    "stdit": "opensora-1.0",
    "pixart": "pixart-alpha-512",
    "dit": "dit-xl2-256",
    "latte": "latte-xl2-ucf101",
}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("text") / "t5"
    write_t5(folder)
    return folder


class Tiny:
    """A tiny released checkpoint: its entry, its networks, its files."""

    def __init__(self, family: str, folder: Path, text: Path | None) -> None:
        config = tiny_config(family)
        if text is not None:
            t5 = T5TextConfig(dim=16, max_tokens=8, precision="fp32")
            config = replace(config, text=TextComponent(config=t5))
        self.name = f"tiny-{family}"
        self.config: PipelineConfig = config
        like = find_released(LIKE[family])
        self.entry: Released = replace(like, name=self.name, config=config)
        networks = tiny_parts(tiny_config(family))
        self.parts = Parts(
            networks.model, networks.vae, build_text_encoder(config.text.config, text), {}
        )
        self.text = text
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder / "m.safetensors", networks.model.state_dict())
        save_weights(folder / "v.safetensors", networks.vae.state_dict())
        self.model_file = convert(
            folder / "m.safetensors", folder / "model", "original", config=config.model
        ).files[0]
        self.vae_file = convert(
            folder / "v.safetensors", folder / "vae", "original", config=config.vae.config
        ).files[0]

    def register(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(table, "RELEASED", (*table.RELEASED, self.entry))

    def flags(self) -> list[str]:
        flags = ["--model", self.name, "--ckpt-path", str(self.model_file), "--offline"]
        flags += ["--vae", str(self.vae_file)]
        return flags if self.text is None else [*flags, "--text", str(self.text)]


@pytest.mark.parametrize("family", FAMILIES)
def test_files_as_published_give_the_same_video(
    family: str, tmp_path: Path, monkeypatch: Any, t5: Path
) -> None:
    tiny = Tiny(family, tmp_path, None if family in ("dit", "latte") else t5)
    tiny.register(monkeypatch)
    prompt = prompts_of(family)[0]
    pipeline = Pipeline.from_pretrained(
        tiny.name, model=tiny.model_file, vae=tiny.vae_file, text=tiny.text, offline=True,
        device="cpu",
    )  # fmt: skip
    clip = pipeline.generate(prompt, seed=3)
    direct = Pipeline(tiny.config, tiny.parts, device="cpu").generate(prompt, seed=3)
    assert np.array_equal(clip.frames, direct.frames)
    assert clip.frames.std() > 1

    result = CliRunner().invoke(
        app,
        ["generate", *tiny.flags(), "--prompt", prompt, "--seed", "3",
         "--save-dir", str(tmp_path / "out")],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".mp4", ".png")]
    assert len(made) == 1


def test_weights_of_another_model_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    latte, dit = (Tiny(family, tmp_path / family, None) for family in ("latte", "dit"))
    latte.register(monkeypatch)
    state = torch.load(latte.model_file, weights_only=True)["ema"]
    del state["blocks.0.attn.qkv.bias"]
    torch.save(state, tmp_path / "cut.pt")
    pipeline = Pipeline.from_pretrained(
        latte.name, model=tmp_path / "cut.pt", vae=latte.vae_file, offline=True, device="cpu"
    )
    with pytest.raises(KinemaError, match=r"1 tensors missing .*blocks\.0\.attn\.qkv\.bias"):
        pipeline.generate("1")
    swapped = Pipeline.from_pretrained(
        latte.name, model=dit.vae_file, vae=latte.vae_file, offline=True, device="cpu"
    )
    with pytest.raises(KinemaError, match="looks like 2D autoencoder"):
        swapped.generate("1")


def differing(tiny: Tiny, path: Path) -> Path:
    """The tiny model's file without two tensors, one inside a block, and with two strangers."""
    state = dict(tiny.parts.model.state_dict())
    for name in ABSENT:
        del state[name]
    save_weights(path, state | {"lora.a": torch.ones(2), "lora.b": torch.ones(3)})
    return path


ABSENT = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight")


@pytest.mark.parametrize("offload", ["none", "phase", "layers"])
def test_missing_and_extra_tensors_that_were_asked_for(
    offload: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Missing ones get the values of an untrained network, whichever way they come in."""
    tiny = Tiny("latte", tmp_path, None)
    tiny.register(monkeypatch)
    file = differing(tiny, tmp_path / "other.safetensors")
    places = {"model": file, "vae": tiny.vae_file, "offline": True, "device": "cpu"}
    allowed = {
        "allow_new": [r"blocks\.0\.attn\..*", r"x_embedder\..*"],
        "allow_unexpected": [r"lora\..*"],
    }

    pipeline = Pipeline.from_pretrained(tiny.name, **places, **allowed, offload=offload)
    clip = pipeline.generate("1", seed=3)
    assert clip.record["pipeline"]["new_tensors"] == list(ABSENT)
    assert clip.record["pipeline"]["left_out"] == ["lora.a", "lora.b"]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = build_transformer(tiny.config.model).state_dict()
    model = tiny.parts.model
    model.load_state_dict({name: fresh[name] for name in ABSENT}, strict=False)
    direct = Pipeline(tiny.config, tiny.parts, device="cpu").generate("1", seed=3)
    assert np.array_equal(clip.frames, direct.frames)

    for left_out in allowed:  # each is needed
        rest = {name: value for name, value in allowed.items() if name != left_out}
        with pytest.raises(KinemaError, match=r"2 tensors (missing|unknown)"):
            Pipeline.from_pretrained(tiny.name, **places, **rest).generate("1")
    with pytest.raises(KinemaError, match="is no regular expression"):
        Pipeline.from_pretrained(tiny.name, **places, allow_new=["["]).generate("1")


def test_the_command_says_what_it_let_pass(tmp_path: Path, monkeypatch: Any) -> None:
    tiny = Tiny("latte", tmp_path, None)
    tiny.register(monkeypatch)
    tiny.model_file = differing(tiny, tmp_path / "other.safetensors")
    command = ["generate", *tiny.flags(), "--prompt", "1", "--save-dir", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    assert "2 tensors missing from the file" in str(refused.exception)
    assert "2 tensors unknown to the model (lora.a, lora.b)" in str(refused.exception)
    allowed = ["--allow-new", ".*qkv.weight", "--allow-new", "x_emb.*"]
    allowed += ["--allow-unexpected", "lora.*"]
    done = CliRunner().invoke(app, [*command, *allowed], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"2 tensors missing from the weights, so with untrained values: {', '.join(ABSENT)}" in (
        done.stderr
    )
    assert "2 tensors of the weights left out: lora.a, lora.b" in done.stderr


def test_what_is_missing_is_named_before_anything_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(
        app, ["generate", "--model", "opensora-1.2", "--prompt", "x", "--offline"]
    )
    assert isinstance(result.exception, KinemaError)
    text = str(result.exception)
    for repository in ("OpenSora-STDiT-v3", "OpenSora-VAE-v1.2", "t5-v1_1-xxl"):
        assert repository in text


def test_from_the_hub_and_then_without_it(tmp_path: Path, monkeypatch: Any, t5: Path) -> None:
    """All three parts are downloaded; the second video needs no network, and is the same."""
    tiny = Tiny("stdit3", tmp_path, t5)
    hub = Hub()
    hub.files = {
        "tiny/model": {"model.safetensors": tiny.model_file.read_bytes()},
        "tiny/vae": {"model.safetensors": tiny.vae_file.read_bytes()},
        "tiny/t5": {p.name: p.read_bytes() for p in t5.iterdir()},
    }
    text = ("config.json", *(n for n in hub.files["tiny/t5"] if n != "config.json"))
    tiny.entry = replace(
        tiny.entry,
        model=HubFiles("tiny/model", ("model.safetensors",)),
        vae=HubFiles("tiny/vae", ("model.safetensors",)),
        text=HubFiles("tiny/t5", text),
    )
    tiny.register(monkeypatch)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def frames() -> Any:
        pipeline = Pipeline.from_pretrained(tiny.name, device="cpu")
        return pipeline.generate("a red kite over the sea", seed=3).frames

    with hub.serving():
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        first = frames()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = len(hub.requests)
    assert np.array_equal(frames(), first)
    assert len(hub.requests) == count
    direct = Pipeline(tiny.config, tiny.parts, device="cpu")
    assert np.array_equal(direct.generate("a red kite over the sea", seed=3).frames, first)
