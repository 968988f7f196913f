"""Sharpness, brightness, repeated frames and blockiness of rendered footage."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kinema.curation.config import QualityConfig
from kinema.curation.look.quality import QualityAnalyzer, blockiness, quality_columns

from .footage import camera, encode, info_of, look, quality_of, quality_of_file, texture


def test_sharpness_falls_with_blur() -> None:
    wall = texture(360, 640)
    found = []
    for sigma in (0, 0.7, 1.5, 3.0, 6.0):
        picture = cv2.GaussianBlur(wall, (0, 0), sigma) if sigma else wall
        found.append(quality_of(np.repeat(picture[None], 4, 0))["sharpness"])
    assert found == sorted(found, reverse=True)
    assert found[0] > 10 * found[-1]


def test_sharpness_is_the_variance_of_the_laplacian_at_640_pixels() -> None:
    wall = texture(360, 640)
    wanted = cv2.Laplacian(wall, cv2.CV_64F).var()
    assert quality_of(wall[None])["sharpness"] == pytest.approx(wanted, rel=0.01)


def test_sharpness_of_the_same_picture_at_other_sizes() -> None:
    wall = texture(1440, 2560)
    full = cv2.resize(wall, (640, 360), interpolation=cv2.INTER_AREA)
    wanted = quality_of(full[None])["sharpness"]
    assert quality_of(wall[None])["sharpness"] == pytest.approx(wanted, rel=0.05)
    # A small picture does not gain detail by being shown large.
    coarse = cv2.resize(full, (160, 90), interpolation=cv2.INTER_AREA)
    blown_up = cv2.resize(coarse, (1280, 720), interpolation=cv2.INTER_CUBIC)
    assert quality_of(coarse[None])["sharpness"] < 0.5 * wanted
    assert quality_of(blown_up[None])["sharpness"] < 0.5 * wanted


def test_sharpness_of_limited_and_full_range_agree(tmp_path: Path) -> None:
    frames = camera(4, (360, 640))
    wanted = quality_of(frames)["sharpness"]
    found = quality_of_file(encode(tmp_path / "a.mp4", frames, crf="4"))["sharpness"]
    assert found == pytest.approx(wanted, rel=0.15)  # rounding twice is noise


def test_brightness(tmp_path: Path) -> None:
    frames = np.empty((8, 90, 160), np.uint8)
    frames[:], frames[:, :, :80] = 50, 150
    path = encode(tmp_path / "a.mp4", frames, crf="4")
    assert quality_of_file(path)["brightness"] == pytest.approx(100, abs=1)
    assert quality_of(frames)["brightness"] == pytest.approx(100, abs=1)


def test_dark_and_bright_shares() -> None:
    frames = np.full((8, 180, 320), 100, np.uint8)
    frames[:, :60, :] = 250
    frames[:, 60:80, :160] = 5
    columns = quality_of(frames)
    assert columns["bright_share"] == pytest.approx(1 / 3, abs=0.01)
    assert columns["dark_share"] == pytest.approx(1 / 18, abs=0.01)
    assert columns["border_share"] == 0


def test_bars_are_no_dark_pixels() -> None:
    frames = camera(8, right=lambda t: 2.0 * t)
    plain = quality_of(frames)
    barred = np.zeros((8, 240, 320), np.uint8)
    barred[:, 30:210] = frames
    columns = quality_of(barred)
    assert (columns["border_top"], columns["border_bottom"]) == (30, 30)
    assert columns["border_share"] == pytest.approx(0.25)
    assert columns["dark_share"] == pytest.approx(plain["dark_share"], abs=0.01)
    assert columns["brightness"] == pytest.approx(plain["brightness"], rel=0.06)
    assert columns["sharpness"] == pytest.approx(plain["sharpness"], rel=0.15)


@pytest.mark.parametrize("crf", ["18", "30", "36"])
def test_every_other_frame_repeated(tmp_path: Path, crf: str) -> None:
    frames = camera(30, (360, 640), right=lambda t: 2.0 * (t // 2))
    path = encode(tmp_path / "a.mp4", frames, crf=crf)
    assert quality_of_file(path)["duplicate_share"] == pytest.approx(0.5, abs=0.04)


def test_drawings_shown_for_three_frames() -> None:
    frames = camera(60, right=lambda t: 2.0 * (t // 3)).astype(np.float64)
    frames += np.random.default_rng(0).normal(0, 0.4, frames.shape)
    found = quality_of(frames.clip(0, 255).astype(np.uint8))["duplicate_share"]
    assert found == pytest.approx(2 / 3, abs=0.08)


def test_slow_motion_is_no_repetition(tmp_path: Path) -> None:
    frames = camera(30, (360, 640), right=lambda t: 0.5 * t)
    path = encode(tmp_path / "a.mp4", frames)
    assert quality_of_file(path)["duplicate_share"] == 0


def test_the_first_frame_of_a_clip_repeats_nothing_of_it() -> None:
    frames = np.repeat(camera(6, right=lambda t: 9.0 * t), 2, 0)
    signals = look(QualityAnalyzer(QualityConfig(), info_of(frames, 30.0)), frames, 30.0)
    assert quality_columns(signals, 0, 12)["duplicate_share"] == 0.5
    assert quality_columns(signals, 1, 3)["duplicate_share"] == 0


def test_blockiness_of_coarse_coding(tmp_path: Path) -> None:
    frames = camera(12, (360, 640), right=lambda t: 2.0 * t)
    found = [
        quality_of_file(encode(tmp_path / f"{crf}.mp4", frames, crf=crf))["blockiness"]
        for crf in ("18", "45")
    ]
    assert found[1] > 2 * found[0]
    assert found[1] > 0.2


@pytest.mark.parametrize("quality", [10, 90])
def test_blockiness_of_jpeg_wherever_its_grid_lies(quality: int) -> None:
    coded = cv2.imencode(".jpg", texture(368, 648), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    picture = cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE)
    for left, top in ((0, 0), (3, 5)):
        found = blockiness(picture[top : top + 360, left : left + 640])
        assert found > 0.3 if quality == 10 else found < 0.1


def test_blockiness_of_a_flat_picture_is_none() -> None:
    assert blockiness(np.full((90, 160), 90, np.uint8)) == 0
    assert blockiness(np.full((6, 6), 90, np.uint8)) == 0


def test_a_clip_without_a_sample_has_nulls() -> None:
    frames = camera(30)
    signals = look(QualityAnalyzer(QualityConfig(per_s=1.0), info_of(frames, 30.0)), frames, 30.0)
    columns = quality_columns(signals, 5, 20)
    assert columns["duplicate_share"] > 0.9
    assert columns["sharpness"] is columns["border_top"] is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (2, 2), (16, 8), (98, 34)])
def test_tiny_pictures(shape: tuple[int, int]) -> None:
    assert quality_of(np.full((3, *shape), 100, np.uint8))["brightness"] == 100
