"""`kinema generate` with T5: from the checkpoint's own folder or another, in each precision."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from kinema.checkpoint.run import save_checkpoint
from kinema.checkpoint.weights import save_weights
from kinema.cli.main import app
from kinema.config.errors import KinemaError
from kinema.config.settings import to_dict
from kinema.generation.config import TextComponent
from kinema.generation.pipeline import Pipeline
from kinema.models.build import build_transformer, build_vae
from kinema.models.config import T5TextConfig
from kinema.training.encode import CachedTextEncoder, write_text_cache
from tests.unit.generation.tiny import tiny_config, write_run
from tests.unit.models.text_folders import write_t5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its autoencoder and T5 beside the run folder."""
    folder = tmp_path_factory.mktemp("run")
    write_t5(folder / "t5")
    config = tiny_config(vae_weights="../../vae.safetensors")
    text = T5TextConfig(dim=16, max_tokens=config.text.config.max_tokens, precision="fp32")
    config = replace(config, text=TextComponent(config=text, weights="../../t5"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_weights(folder / "vae.safetensors", build_vae(config.vae.config).state_dict())
        model = build_transformer(config.model)
        for parameter in model.parameters():  # those that start at zero would hide the text
            torch.nn.init.normal_(parameter, std=0.2)
    weights = model.state_dict()
    (folder / "000-tiny").mkdir()
    return save_checkpoint(
        folder / "000-tiny", 0, 1, model=weights, ema=weights, state={}, components=to_dict(config)
    ).path


def latents(checkpoint: Path, prompt: str = "a cat", **options: Any) -> torch.Tensor:
    pipeline = Pipeline.from_pretrained(checkpoint, device="cpu", **options)
    request = pipeline.request(prompt, num_frames=17, width=32, height=32, num_sampling_steps=2)
    return pipeline.latents([request])


def test_precisions_differ_a_little_and_captions_more(checkpoint: Path) -> None:
    exact = latents(checkpoint)
    assert torch.equal(latents(checkpoint, text_dtype="fp32"), exact)
    assert torch.equal(latents(checkpoint, offload="phase"), exact)
    other = float((latents(checkpoint, "one two three") - exact).norm())
    for precision in ("bf16", "int8"):
        off = float((latents(checkpoint, text_dtype=precision) - exact).norm())
        assert 0 < off < 0.2 * other, precision


def test_a_cache_of_prompts_stands_for_the_encoder(checkpoint: Path, tmp_path: Path) -> None:
    whole = Pipeline.from_pretrained(checkpoint, device="cpu")
    parts = whole.load()
    write_text_cache(["a dog", "a cat"], parts.text, tmp_path / "text", dtype="float32")
    cached = CachedTextEncoder.open(tmp_path / "text", parts.text.config)
    pipeline = Pipeline(whole.config, replace(parts, text=cached), device="cpu")
    request = pipeline.request("a cat", num_frames=17, width=32, height=32, num_sampling_steps=2)
    assert torch.equal(pipeline.latents([request]), latents(checkpoint))
    with pytest.raises(KinemaError, match="no embedding of 'a cow'"):
        pipeline.latents([replace(request, prompt="a cow")])


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, words)])


def test_the_command_takes_8_bits_and_says_what_is_lost(checkpoint: Path, tmp_path: Path) -> None:
    done = run(
        "--ckpt-path", checkpoint, "--prompt", "one two three four five six", "--text-dtype",
        "int8", "--negative-prompt", "six five four three two one",
        "--num-sampling-steps", 1, "--save-dir", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "the prompt is longer" in done.stderr
    assert "the negative prompt is longer" in done.stderr
    (sidecar,) = (tmp_path / "out").glob("*.json")
    assert json.loads(sidecar.read_text())["text_dtype"] == "int8"


def test_what_cannot_be_is_said(checkpoint: Path, tmp_path: Path) -> None:
    done = run("--ckpt-path", checkpoint, "--prompt", "a cat", "--text-dtype", "int4")
    assert "one of fp32, bf16, int8" in str(done.exception)
    words = write_run(tmp_path)
    done = run("--ckpt-path", words, "--prompt", "a cat", "--text-dtype", "int8")
    assert "'hash-words' has one precision" in str(done.exception)
    done = run("--ckpt-path", checkpoint, "--prompt", "a cat", "--text", tmp_path / "nowhere")
    assert "text encoder's weights are missing" in str(done.exception)


def test_a_cache_needs_no_text_encoder(checkpoint: Path, tmp_path: Path) -> None:
    """`--text-cache` gives the same video with T5's folder gone, and the sidecar names its T5."""
    whole = Pipeline.from_pretrained(checkpoint, device="cpu")
    text = whole.load().text
    write_text_cache(["a cat", "a dog"], text, tmp_path / "text", dtype="float32")
    alone = tmp_path / "run" / "000-tiny" / checkpoint.name
    shutil.copytree(checkpoint, alone)
    shutil.copy(checkpoint.parents[1] / "vae.safetensors", tmp_path / "run")
    words = (
        "--ckpt-path", alone, "--num-sampling-steps", 1, "--device", "cpu", "--save-dir",
        tmp_path / "out",
    )  # fmt: skip
    cache = ("--text-cache", tmp_path / "text")
    assert "text encoder's weights are missing" in str(run(*words, "--prompt", "a cat").exception)
    done = run(*words, *cache, "--prompt", "a cat", "--negative-prompt", "a dog")
    assert done.exit_code == 0, done.output
    (sidecar,) = (tmp_path / "out").glob("*.json")
    assert json.loads(sidecar.read_text())["pipeline"]["text_weights"] == text.weights_id
    encoder = functools.partial(CachedTextEncoder.open, tmp_path / "text")
    assert torch.equal(latents(alone, text_encoder=encoder), latents(checkpoint))
    layers = latents(alone, text_encoder=encoder, offload="layers")
    assert torch.equal(layers, latents(checkpoint))

    absent = run(*words, *cache, "--prompt", "a cow")
    assert "no embedding of 'a cow'" in str(absent.exception)
    negative = run(*words, *cache, "--prompt", "a cat", "--negative-prompt", "a cow")
    assert "no embedding of 'a cow'" in str(negative.exception)
    other = run(*words, *cache, "--prompt", "a cat", "--text-dtype", "bf16")
    assert 'precision is "fp32" in the cache, now "bf16"' in str(other.exception)
    both = run(*words, *cache, "--prompt", "a cat", "--text", checkpoint.parents[1] / "t5")
    assert "another text encoder was given" in str(both.exception)
