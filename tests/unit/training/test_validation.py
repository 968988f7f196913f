"""Which clips are validated, and on what noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.config.settings import from_dict
from kinema.data.config import DataConfig
from kinema.data.manifest import Manifest
from kinema.training.held_out import choose, refuse_shared
from kinema.training.validation import Validation, levels


def manifest(root: Path, *paths: str, frames: int = 60, size: int = 300) -> Manifest:
    count = len(paths)
    return Manifest.from_columns(
        {
            "path": list(paths),
            "text": ["a film"] * count,
            "num_frames": [frames] * count,
            "height": [size] * count,
            "width": [size] * count,
            "fps": [24.0] * count,
        },
        root,
    )


def buckets(rules: dict[str, Any]) -> DataConfig:
    return from_dict(DataConfig, {"buckets": rules})


def test_the_first_clips_of_every_bucket_whatever_its_probability(tmp_path: Path) -> None:
    data = buckets(
        {
            "144p": {1: [1.0, 8], 17: [0.01, 4], 51: [[0.1, 0.2], 2], 102: [1.0, 1]},
            "240p": {17: [0.5, 2], 51: [0.0, None]},
            "1080p": {17: [1.0, 1]},
        }
    )
    clips = manifest(tmp_path, *(f"{i}.mp4" for i in range(5)))
    clips = clips.with_dropped({1: "blurred"})
    chosen = choose(clips, data, 2)
    found = [(c.bucket.resolution, c.bucket.frames, c.row, c.bucket.max_batch) for c in chosen]
    assert sorted(found) == [
        ("144p", 17, 0, 4),
        ("144p", 17, 2, 4),
        ("144p", 51, 0, 2),
        ("144p", 51, 2, 2),
        ("240p", 17, 0, 2),
        ("240p", 17, 2, 2),
    ]
    assert {(c.bucket.height, c.bucket.width) for c in chosen} == {(192, 192), (320, 320)}


def test_no_clip_for_any_bucket_is_said(tmp_path: Path) -> None:
    data = buckets({"1080p": {17: [1.0, 1]}})
    with pytest.raises(KinemaError, match="large and long enough"):
        choose(manifest(tmp_path, "a.mp4"), data, 2)


@pytest.mark.parametrize("written", ["{root}/clips/b.mp4", "clips/b.mp4", "./clips/b.mp4"])
def test_clips_that_are_trained_on_are_refused(tmp_path: Path, written: str) -> None:
    training = manifest(tmp_path, "clips/a.mp4", written.format(root=tmp_path), "clips/c.mp4")
    refuse_shared(manifest(tmp_path / "clips", "x.mp4", "y.mp4"), training)
    refuse_shared(manifest(tmp_path / "other", "a.mp4", "b.mp4"), training)
    with pytest.raises(KinemaError, match="1 of its 2 clips are trained on as well") as error:
        refuse_shared(manifest(tmp_path / "clips", "x.mp4", "b.mp4"), training)
    assert "b.mp4" in str(error.value)


def test_timesteps_are_at_equal_distances_and_never_at_the_ends() -> None:
    assert levels(1) == [0.5]
    assert levels(4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [f"{level:.2f}" for level in levels(10)][::3] == ["0.09", "0.36", "0.64", "0.91"]


def test_what_could_not_be_read_is_in_no_mean(tmp_path: Path) -> None:
    data = buckets({"144p": {17: [1.0, 4], 51: [1.0, 2]}})
    validation = Validation.__new__(Validation)
    validation.clips = choose(manifest(tmp_path, "a.mp4", "b.mp4"), data, 2)
    validation._levels = levels(2)
    assert [clip.bucket.frames for clip in validation.clips] == [51, 51, 17, 17]
    # Losses by noise, and whether the clip was read.
    table = torch.tensor([[1.0, 3.0, 1.0], [0.0, 0.0, 0.0], [2.0, 6.0, 1.0], [4.0, 8.0, 1.0]])
    assert validation._summary(table.double()) == {
        "val_loss": 4.0,
        "val/144p-51f": 2.0,
        "val/144p-17f": 5.0,
        "val_t/0.33": pytest.approx(7 / 3),
        "val_t/0.67": pytest.approx(17 / 3),
    }
    table[:, 2] = 0
    with pytest.raises(KinemaError, match="none of the validation's clips could be read"):
        validation._summary(table)
