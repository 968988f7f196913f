"""Text embeddings worked out beforehand train as the encoder itself does."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from kinema.checkpoint.run import Checkpoint
from kinema.cli.main import app
from kinema.config.errors import KinemaError
from kinema.config.recipe import load_recipe
from kinema.config.settings import to_dict
from kinema.data.manifest import Manifest
from kinema.data.text_cache import TextCache
from kinema.models.build import build_text_encoder
from kinema.models.config import ClassTextConfig, CLIPTextConfig, T5TextConfig
from kinema.models.text import TextEncoder, TextFeatures
from kinema.training.config import TrainRecipe
from kinema.training.encode import CachedTextEncoder, write_text_cache
from kinema.training.run import train
from tests.integration.train_fixtures import smoke, write_clips
from tests.unit.models.text_folders import write_clip, write_t5

T5 = ["text.type=t5", "text.max_tokens=8", "text.dim=16", "text.precision=fp32"]


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["text", "encode", *map(str, words)], catch_exceptions=True)


def final_weights(recipe: TrainRecipe) -> str:
    return str(Checkpoint.open(train(recipe, device="cpu").run).section_hash("model"))


def test_training_from_a_cache_equals_training_from_the_encoder(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, count=8)
    text = load_recipe("tiny/smoke", TrainRecipe).text
    assert text is not None
    cache, encoder = tmp_path / "text", build_text_encoder(text)
    write_text_cache(Manifest.read(manifest), encoder, cache, dtype="float32", batch_size=3)
    outputs = tmp_path / "out"
    plain = final_weights(smoke(manifest, outputs, "max_steps=2"))
    assert final_weights(smoke(manifest, outputs, "max_steps=2", f"text_cache='{cache}'")) == plain

    other = write_clips(tmp_path / "other", count=8, seed=3)
    with pytest.raises(KinemaError, match="does not fit"):
        train(smoke(other, outputs, f"text_cache='{cache}'"), device="cpu")


def test_so_it_does_with_t5(tmp_path: Path) -> None:
    manifest, outputs, cache = write_clips(tmp_path, count=8), tmp_path / "out", tmp_path / "text"
    write_t5(tmp_path / "t5")
    weights = f"text_weights='{tmp_path / 't5'}'"
    done = run("tiny/smoke", *T5, weights, "--data-path", manifest, "-o", cache,
               "--dtype", "float32", "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    changes = [*T5, "max_steps=2"]
    online = final_weights(smoke(manifest, outputs, *changes, weights))
    from_cache = [*changes, f"text_cache='{cache}'"]
    assert final_weights(smoke(manifest, outputs, *from_cache)) == online
    assert final_weights(smoke(manifest, outputs, *from_cache, weights)) == online

    write_t5(tmp_path / "others", seed=1)
    others = f"text_weights='{tmp_path / 'others'}'"
    with pytest.raises(KinemaError, match=r"weights is .* in the cache, now"):
        train(smoke(manifest, outputs, *from_cache, others), device="cpu")
    with pytest.raises(KinemaError, match='precision is "fp32" in the cache, now "bf16"'):
        train(smoke(manifest, outputs, *from_cache, "text.precision=bf16"), device="cpu")


def test_the_command_takes_changes_to_the_recipe(tmp_path: Path) -> None:
    manifest, cache = write_clips(tmp_path, count=4), tmp_path / "text"
    changes = ["text.dim=8", "--model.caption_channels", "8"]
    done = run("tiny/smoke", *changes, "--data-path", manifest, "-o", cache)
    assert done.exit_code == 0, done.output
    assert "encoding captions: 4/4 captions" in done.stderr
    outputs = tmp_path / "out"
    with pytest.raises(KinemaError, match="dim"):
        train(smoke(manifest, outputs, f"text_cache='{cache}'"), device="cpu")
    settings = ["text.dim=8", "model.caption_channels=8", f"text_cache='{cache}'", "max_steps=1"]
    assert train(smoke(manifest, outputs, *settings), device="cpu").step == 1


def test_prompts_have_a_cache_too(tmp_path: Path) -> None:
    write_t5(tmp_path / "t5")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n|0|a green field|2|the lazy dog\na red circle\n")
    done = run("tiny/smoke", *T5, "--prompt-path", prompts, "-o", tmp_path / "text",
               "--text-weights", tmp_path / "t5", "--dtype", "float32", "--aes", "6.5")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "warning: caption 0" in done.stderr
    assert "this is lost:" in done.stderr
    config = T5TextConfig(max_tokens=8, dim=16, precision="fp32")
    encoder = build_text_encoder(config, tmp_path / "t5")
    cached = CachedTextEncoder.open(tmp_path / "text", config)
    assert cached.weights_id == encoder.weights_id
    texts = ["the lazy dog", "a red circle aesthetic score: 6.5.", "a red circle", "a green field"]
    want, got = encoder.encode(texts), cached.encode(texts)
    assert want.mask is not None
    assert got.mask is not None
    assert want.mask.equal(got.mask)
    assert want.y.equal(got.y)
    assert cached.encode([]).y.shape == (0, 1, 8, 16)
    with pytest.raises(KinemaError, match="no embedding of 'a blue circle'"):
        cached.encode(["a blue circle"])


def test_weights_may_be_named_as_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat")
    command = ["tiny/smoke", *T5, "--prompt-path", prompts, "-o", tmp_path / "text"]
    done = run(*command, "--text-weights", "DeepFloyd/t5-v1_1-xxl")
    for file in ("config.json", "pytorch_model.bin.index.json", "spiece.model"):
        assert file in str(done.exception)
    done = run(*command, "--text-weights", "no where")
    assert "no such file or folder (the text encoder)" in str(done.exception)


class Stopping(TextEncoder):
    """Stops after some captions, as a person would."""

    def __init__(self, inner: TextEncoder, captions: int) -> None:
        self.config, self._inner, self.left = inner.config, inner, captions

    def encode(self, texts: list[str]) -> TextFeatures:  # type: ignore[override]
        self.left -= len(texts)
        if self.left < 0:
            raise KeyboardInterrupt
        return self._inner.encode(texts)

    def lost(self, text: str) -> str:
        return self._inner.lost(text)


def test_a_stopped_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinema.data.text_cache_writer.SHARD_BYTES", 1)
    captions = [f"caption {i}" for i in range(9)]
    text = load_recipe("tiny/smoke", TrainRecipe).text
    assert text is not None
    encoder = build_text_encoder(text)
    with pytest.raises(KeyboardInterrupt):
        write_text_cache(captions, Stopping(encoder, 6), tmp_path / "text", batch_size=2)
    rest = Stopping(encoder, 3)
    write_text_cache(captions, rest, tmp_path / "text", batch_size=2)
    assert rest.left == 0
    cache = TextCache.open(tmp_path / "text", None, to_dict(text))
    write_text_cache(captions, encoder, tmp_path / "whole")
    whole = TextCache.open(tmp_path / "whole", None, to_dict(text))
    assert (cache.features(range(9))[0] == whole.features(range(9))[0]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny/smoke"], "no captions are named"),
        (["tiny/smoke", "--data-path", "a.csv", "--prompt-path", "p.txt"], "give one"),
        (["tiny/smoke", "--data-path", "a.csv", "--aes", "6"], "scores belong to prompts"),
        (["tiny/vae", "--data-path", "a.csv"], "has no text encoder"),
        (["tiny/smoke", "--prompt-path", "p.txt", *T5], "no folder of them is named"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\n")
    done = run(*words, "-o", tmp_path / "text")
    assert message in str(done.exception)
    assert not (tmp_path / "text").exists()


def test_encoders_that_cost_nothing_have_no_cache(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    clip = build_text_encoder(CLIPTextConfig(dim=16), tmp_path / "clip")
    for encoder in (clip, build_text_encoder(ClassTextConfig())):
        with pytest.raises(KinemaError, match="needs no cache"):
            write_text_cache(["1"], encoder, tmp_path / "text")
