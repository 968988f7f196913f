"""Strips of five clips, and one model of each kind for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kinema.curation.stage import Places, Row
from tests.unit.curation.scoring.tiny_models import (
    drawn,
    write_classifier,
    write_clip_model,
    write_siglip_model,
    write_strip,
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """Name -> folder, transformers' own model."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "clip": write_clip_model(folder / "clip"),
        "siglip": write_siglip_model(folder / "siglip"),
        "classifier": write_classifier(folder / "classifier", ["normal", "NSFW", "drawing"]),
    }
    return {name: (str(folder / name), model) for name, model in made.items()}


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places.below(str(tmp_path / "out"))


@pytest.fixture
def rows(places: Places) -> list[Row]:
    """Five clips of different shapes and numbers of frames."""
    shapes = [(3, (40, 64)), (3, (40, 64)), (1, (64, 40)), (4, (30, 30)), (3, (40, 64))]
    texts = ["a red circle", "the lazy dog, café", "one", None, "two three four " * 9]
    return [
        write_strip(places, f"c{i}", drawn(i, count, size)) | {"text": text}
        for i, ((count, size), text) in enumerate(zip(shapes, texts, strict=True))
    ]
