"""An attention kernel that cannot run here is refused before anything is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.config.errors import KinemaError
from kinema.generation.pipeline import Pipeline
from kinema.training.run import train
from tests.integration.train_fixtures import smoke, write_clips
from tests.unit.generation.tiny import write_run


def test_generation(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, "stdit")
    with pytest.raises(KinemaError, match="'flash3' cannot run on cpu in float32, 16 channels"):
        Pipeline.from_pretrained(checkpoint, attention="flash3", device="cpu")
    with pytest.raises(KinemaError, match="'cudnn' cannot run on cpu in bfloat16"):
        Pipeline.from_pretrained(checkpoint, attention="cudnn", dtype="bf16", device="cpu")

    assert Pipeline.from_pretrained(checkpoint, attention="math", device="cpu")


def test_training(tmp_path: Path) -> None:
    recipe = smoke(write_clips(tmp_path), tmp_path / "runs", "model.attention='flash3'")
    with pytest.raises(KinemaError, match="'flash3' cannot run on cpu in float32"):
        train(recipe, device="cpu")
    assert not list((tmp_path / "runs").glob("*"))
