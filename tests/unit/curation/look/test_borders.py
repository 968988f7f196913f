"""Black bars of known pixels."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kinema.curation.look.borders import SEGMENTS, Borders, segment_means, turned_borders

from .footage import Array, camera, encode, quality_of, quality_of_file


def barred(frames: Array, top: int = 0, bottom: int = 0, left: int = 0, right: int = 0) -> Array:
    return np.pad(frames, ((0, 0), (top, bottom), (left, right)))


def borders_of(columns: dict[str, int]) -> tuple[int, ...]:
    return tuple(columns[f"border_{side}"] for side in ("top", "bottom", "left", "right"))


def moving(size: tuple[int, int] = (270, 480), count: int = 24) -> Array:
    return camera(count, size, right=lambda t: 3.0 * t)


@pytest.mark.parametrize(
    "bars", [(40, 40, 0, 0), (0, 0, 60, 60), (31, 17, 0, 0), (0, 0, 50, 0), (44, 44, 90, 90)]
)
def test_bars_of_known_pixels(bars: tuple[int, int, int, int]) -> None:
    columns = quality_of(barred(moving(), *bars))
    assert borders_of(columns) == bars
    height, width = 270 + bars[0] + bars[1], 480 + bars[2] + bars[3]
    assert columns["border_share"] == pytest.approx(1 - 270 * 480 / (height * width))


@pytest.mark.parametrize("crf", ["18", "32"])
def test_bars_of_a_coded_file(tmp_path: Path, crf: str) -> None:
    path = encode(tmp_path / "a.mp4", barred(moving(), 45, 45), crf=crf)
    assert borders_of(quality_of_file(path)) == pytest.approx((45, 45, 0, 0), abs=1)


def test_bars_with_noise() -> None:
    draw = np.random.default_rng(1)
    frames = barred(moving(), 40, 40).astype(np.float64)
    frames = np.clip(frames + draw.normal(0, 6, frames.shape), 0, 255).astype(np.uint8)
    assert borders_of(quality_of(frames)) == pytest.approx((40, 40, 0, 0), abs=1)


def test_a_half_dark_line_between_bar_and_picture_is_cropped_too() -> None:
    frames = barred(moving(), 40, 40)
    frames[:, 39] = frames[:, 40] // 5
    frames[:, -40] = frames[:, -41] // 5
    assert borders_of(quality_of(frames)) == (40, 40, 0, 0)


def test_a_narrow_picture_in_a_wide_one() -> None:
    columns = quality_of(barred(camera(24, (320, 180), up=lambda t: 3.0 * t), 0, 0, 190, 190))
    assert borders_of(columns) == (0, 0, 190, 190)


def night(count: int = 30) -> Array:
    """Black sky and street, some lit windows, a lamp that moves: no bars."""
    draw = np.random.default_rng(4)
    frames = np.full((count, 270, 480), 4, np.uint8)
    for _ in range(25):
        y, x = draw.integers(60, 240), draw.integers(10, 450)
        frames[:, y : y + 12, x : x + 8] = draw.integers(60, 200)
    for t in range(count):
        frames[t, 200:215, 8 * t : 8 * t + 15] = 220
    return frames


def test_a_dark_scene_has_no_bars() -> None:
    assert borders_of(quality_of(night())) == (0, 0, 0, 0)
    assert borders_of(quality_of(moving() // 24)) == (0, 0, 0, 0)
    assert borders_of(quality_of(np.zeros((12, 270, 480), np.uint8))) == (0, 0, 0, 0)


def test_a_dark_moment_in_a_film_with_bars() -> None:
    frames = moving(count=60)
    frames[:25] = frames[:25] // 40  # nearly black
    assert borders_of(quality_of(barred(frames, 40, 40))) == (40, 40, 0, 0)


def test_a_dark_film_with_bars() -> None:
    assert borders_of(quality_of(barred(moving() // 6, 40, 40))) == (40, 40, 0, 0)


def test_bars_that_come_and_go_are_none() -> None:
    frames = barred(moving(count=60), 40, 40)
    frames[30:] = moving((350, 480), 30)
    assert borders_of(quality_of(frames)) == (0, 0, 0, 0)


def test_subtitles_and_a_logo_in_the_bar() -> None:
    frames = barred(moving(), 60, 60)
    frames[:, -45:-25, 140:340:7] = 235
    frames[:, -45:-25, 141:341:7] = 235
    frames[:, 10:30, 420:450] = 180
    assert borders_of(quality_of(frames)) == (60, 60, 0, 0)


def test_a_bright_frame_around_the_picture_is_no_black_bar() -> None:
    frames = np.pad(moving(), ((0, 0), (40, 40), (0, 0)), constant_values=200)
    assert borders_of(quality_of(frames)) == (0, 0, 0, 0)


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_bars_of_turned_videos(rotation: int) -> None:
    shown = Borders(40, 20, 10, 0)
    frames = barred(moving(), *shown)
    stored = np.ascontiguousarray(np.rot90(frames, rotation // 90, axes=(1, 2)))
    found = Borders(*borders_of(quality_of(stored)))
    assert turned_borders(found, rotation) == shown


SAMPLES = Path(__file__).parents[5] / "shared" / "videos"


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the sample videos are not here")
def test_real_bars() -> None:
    # 4:3 in 640 x 360, with rounded sides.
    found = borders_of(quality_of_file(SAMPLES / "chaplin_policeman.mp4"))
    assert found == pytest.approx((0, 0, 72, 72), abs=1)
    assert borders_of(quality_of_file(SAMPLES / "classroom.mp4")) == (0, 0, 0, 0)
    assert borders_of(quality_of_file(SAMPLES / "sign_night.mkv")) == (0, 0, 0, 0)


@pytest.mark.parametrize("size", [(720, 1280), (1080, 600), (90, 160), (8, 24), (5, 3)])
def test_means_of_segments_are_those_of_an_area(size: tuple[int, int]) -> None:
    height, width = size
    stored = np.random.default_rng(0).integers(0, 256, (height, width + 7), np.uint8)
    luma = stored[:, :width]  # lines of a decoder are often longer than the picture
    by_row, by_column = segment_means(luma)
    area = cv2.INTER_AREA
    np.testing.assert_array_equal(by_row, cv2.resize(luma, (SEGMENTS, height), interpolation=area))
    down = cv2.resize(luma, (width, SEGMENTS), interpolation=area)
    np.testing.assert_array_equal(by_column, down)
