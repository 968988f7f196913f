"""Pixel transforms against torch's own interpolation, and the rule of temporal crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from kinema.config.errors import KinemaError
from kinema.media.clip import load_clip, load_image
from kinema.media.transform import (
    center_crop,
    covering_size,
    image_center_crop,
    image_resize_crop,
    last_crop_start,
    resize_crop,
    temporal_crop,
)

sides = st.integers(4, 40)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


@settings(max_examples=40, deadline=None)
@given(sides, sides, sides, sides)
def test_resize_crop_is_torchs_bilinear_cut_in_the_middle(h: int, w: int, th: int, tw: int) -> None:
    frames = noise(2, h, w)
    scaled = covering_size((h, w), (th, tw))
    assert scaled[0] >= th
    assert scaled[1] >= tw
    assert scaled[0] == th or scaled[1] == tw
    floats = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    want = interpolate(floats, size=scaled, mode="bilinear", align_corners=False)
    top, left = (scaled[0] - th) // 2, (scaled[1] - tw) // 2
    want = want[:, :, top : top + th, left : left + tw].permute(1, 0, 2, 3)
    got = resize_crop(frames, (th, tw))
    assert got.dtype == np.float32
    assert got.shape == (3, 2, th, tw)
    assert torch.allclose(torch.from_numpy(got), want, atol=3e-5)


def test_large_pictures_are_resized_as_exactly_as_small_ones() -> None:
    # Where positions are not rounded as torch rounds them, errors grow with the side: 2e-5 here.
    frames = noise(1, 240, 426)
    floats = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    want = interpolate(floats, size=(144, 256), mode="bilinear", align_corners=False) / 127.5 - 1
    got = torch.from_numpy(resize_crop(frames, (144, 256))).transpose(0, 1)
    assert torch.allclose(got, want, atol=2e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(sides, sides, sides, sides)
def test_shapes_and_range_of_all_transforms(h: int, w: int, th: int, tw: int) -> None:
    frames, image = noise(2, h, w), noise(h, w)
    for got, shape in (
        (resize_crop(frames, (th, tw)), (3, 2, th, tw)),
        (center_crop(frames, th), (3, 2, th, th)),
        (image_resize_crop(image, (th, tw)), (3, 1, th, tw)),
        (image_center_crop(image, th), (3, 1, th, th)),
    ):
        assert got.shape == shape
        assert got.dtype == np.float32
        assert got.min() >= -1
        assert got.max() <= 1


def test_the_right_size_passes_untouched() -> None:
    frames = noise(2, 16, 20)
    want = frames.transpose(3, 0, 1, 2) / 127.5 - 1
    assert np.allclose(resize_crop(frames, (16, 20)), want, atol=1e-6)
    assert np.allclose(image_resize_crop(frames[0], (16, 20))[:, 0], want[:, 0], atol=1e-6)


def test_odd_rests_are_cut_differently_for_videos_and_images() -> None:
    columns = np.arange(11, dtype=np.uint8) * 20
    picture = np.broadcast_to(columns[None, :, None], (8, 11, 3))
    video = (resize_crop(picture[None], (8, 8))[0, 0, 0] + 1) * 127.5 / 20
    image = (image_resize_crop(picture, (8, 8))[0, 0, 0] + 1) * 127.5 / 20
    assert round(float(video[0])) == 1  # 3 / 2 rounded down
    assert round(float(image[0])) == 2  # 1.5 rounded to even


@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 4), st.floats(0, 0.999))
def test_temporal_crops_stay_inside(total: int, frames: int, interval: int, draw: float) -> None:
    last = last_crop_start(total, frames, interval)
    start = int(draw * (last + 1))
    if total < frames:
        with pytest.raises(KinemaError, match="frames wanted"):
            temporal_crop(total, frames, interval, start)
        return
    got = temporal_crop(total, frames, interval, start)
    assert len(got) == len(set(got)) == frames
    assert got == sorted(got)
    assert got[0] == start
    assert got[-1] < total


def test_a_clip_from_a_file_is_the_transform_of_its_frames(tmp_path) -> None:
    from kinema.media.image import read_image
    from kinema.media.read import read_frames
    from kinema.media.write import write_image, write_video

    write_video(tmp_path / "a.mp4", noise(9, 32, 48), fps=8)
    want = resize_crop(read_frames(tmp_path / "a.mp4", [1, 4, 8]), (20, 24))
    assert np.array_equal(load_clip(tmp_path / "a.mp4", [1, 4, 8], (20, 24)), want)
    write_image(tmp_path / "a.png", noise(32, 48))
    want = image_resize_crop(read_image(tmp_path / "a.png"), (20, 24))
    assert np.array_equal(load_image(tmp_path / "a.png", (20, 24)), want)
