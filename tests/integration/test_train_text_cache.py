"""Text embeddings worked out beforehand train as the encoder itself does."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.checkpoint.run import Checkpoint
from kinema.config.errors import KinemaError
from kinema.config.recipe import load_recipe
from kinema.data.manifest import Manifest
from kinema.training.config import TrainRecipe
from kinema.training.encode import write_text_cache
from kinema.training.run import train
from tests.integration.train_fixtures import smoke, write_clips


def test_training_from_a_cache_equals_training_from_the_encoder(tmp_path: Path) -> None:
    manifest = write_clips(tmp_path, count=8)
    text = load_recipe("tiny/smoke", TrainRecipe).text
    assert text is not None
    cache = tmp_path / "text"
    write_text_cache(Manifest.read(manifest), text, cache, dtype="float32", batch_size=3)
    outputs = tmp_path / "out"
    plain = train(smoke(manifest, outputs, "max_steps=2"), device="cpu")
    cached = train(smoke(manifest, outputs, "max_steps=2", f"text_cache='{cache}'"), device="cpu")
    hashes = {Checkpoint.open(r.run).section_hash("model") for r in (plain, cached)}
    assert len(hashes) == 1

    other = write_clips(tmp_path / "other", count=8, seed=3)
    with pytest.raises(KinemaError, match="does not fit"):
        train(smoke(other, outputs, f"text_cache='{cache}'"), device="cpu")


def test_the_command_takes_changes_to_the_recipe(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from kinema.cli.main import app

    manifest, cache = write_clips(tmp_path, count=4), tmp_path / "text"
    changes = ["text.dim=8", "--model.caption_channels", "8"]
    command = ["text", "encode", str(manifest), "tiny/smoke", *changes, "-o", str(cache)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    outputs = tmp_path / "out"
    with pytest.raises(KinemaError, match="dim"):
        train(smoke(manifest, outputs, f"text_cache='{cache}'"), device="cpu")
    settings = ["text.dim=8", "model.caption_channels=8", f"text_cache='{cache}'", "max_steps=1"]
    assert train(smoke(manifest, outputs, *settings), device="cpu").step == 1
