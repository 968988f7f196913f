"""Perceptual hashes: as imagehash's, and what they survive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image

from kinema.curation.config import HashConfig
from kinema.curation.look.hashes import PICKS, HashAnalyzer, hash_columns, phash

from .footage import Array, camera, columns_of_file, encode, info_of, look, texture


def hashes_of(frames: Array, fps: float = 30.0, rotation: int = 0) -> list[int]:
    analyzer = HashAnalyzer(HashConfig(), info_of(frames, fps, rotation))
    return _parsed(hash_columns(look(analyzer, frames, fps), 0, len(frames)))


def hashes_of_file(path: Path) -> list[int]:
    return _parsed(columns_of_file(path, lambda i: HashAnalyzer(HashConfig(), i), hash_columns))


def _parsed(columns: dict[str, Any]) -> list[int]:
    return [int(h, 16) for h in columns["phash"].split()]


def distance(first: list[int], second: list[int]) -> float:
    """Mean number of bits that differ."""
    return float(np.mean([(a ^ b).bit_count() for a, b in zip(first, second, strict=True)]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [(180, 320), (320, 180), (41, 37)])
def test_the_same_bits_as_imagehash(seed: int, size: tuple[int, int]) -> None:
    picture = texture(*size, seed)
    assert f"{phash(picture):016x}" == str(imagehash.phash(Image.fromarray(picture)))


def test_the_column_has_five_hashes_of_sixteen_digits() -> None:
    frames = camera(90, right=lambda t: 2.0 * t)
    analyzer = HashAnalyzer(HashConfig(), info_of(frames, 30.0))
    signals = look(analyzer, frames, 30.0)
    text = hash_columns(signals, 0, 90)["phash"].split()
    assert len(text) == PICKS
    assert {len(h) for h in text} == {16}
    assert signals["frames"].tolist() == [0, 15, 30, 45, 60, 75]
    wanted = [int(signals["hashes"][k]) for k in (1, 2, 3, 4, 5)]  # nearest to 9, 27, 45, 63, 81
    assert [int(h, 16) for h in text] == wanted
    assert hash_columns(signals, 31, 44) == {"phash": None}


def test_recoding_and_scaling_change_few_bits(tmp_path: Path) -> None:
    frames = camera(60, (360, 640), right=lambda t: 2.0 * t)
    original = hashes_of(frames)
    small = np.stack([cv2.resize(f, (320, 180), interpolation=cv2.INTER_AREA) for f in frames])
    assert distance(original, hashes_of_file(encode(tmp_path / "a.mp4", frames, crf="35"))) <= 2
    assert distance(original, hashes_of_file(encode(tmp_path / "b.mp4", small))) <= 2
    dimmed = (frames * 0.8 + 10).astype(np.uint8)
    assert distance(original, hashes_of(dimmed)) <= 3


def test_a_small_trim_changes_few_bits() -> None:
    frames = camera(120, right=lambda t: 0.3 * t)
    assert distance(hashes_of(frames), hashes_of(frames[6:-6])) <= 4


def test_other_content_differs_in_about_half_of_the_bits() -> None:
    first, second = hashes_of(camera(30, seed=1)), hashes_of(camera(30, seed=2))
    assert distance(first, second) > 16


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_video_has_the_hash_of_what_is_shown(rotation: int) -> None:
    shown = camera(10)
    stored = np.ascontiguousarray(np.rot90(shown, rotation // 90, axes=(1, 2)))
    assert distance(hashes_of(stored, rotation=rotation), hashes_of(shown)) == 0
