"""Pixel transforms and temporal crops of 1.2."""

from __future__ import annotations

import random

import torch

from kinema.config.errors import KinemaError
from kinema.media.transform import (
    center_crop,
    image_center_crop,
    image_resize_crop,
    last_crop_start,
    resize_crop,
    temporal_crop,
)
from tests.parity.case import Case, adapter


@adapter(r"get_transforms_video / get_transforms_image")
def transforms(case: Case) -> None:
    frames = case.input("clip").permute(0, 2, 3, 1).numpy()  # [T, 3, H, W] -> [T, H, W, 3]
    height, width = case.config["size"]
    size = (height, width)
    side = case.config.get("center_size", 0)
    case.check_each(
        {
            "out.resize_crop": lambda: torch.from_numpy(resize_crop(frames, size).swapaxes(0, 1)),
            "out.image_resize_crop": lambda: torch.from_numpy(
                image_resize_crop(frames[0], size)[:, 0]
            ),
            "out.center": lambda: torch.from_numpy(center_crop(frames, side).swapaxes(0, 1)),
            "out.image_center": lambda: torch.from_numpy(image_center_crop(frames[0], side)[:, 0]),
        }
    )


@adapter(r"temporal_random_crop")
def temporal_random_crop(case: Case) -> None:
    rows = case.table()["rows"]
    assert rows
    for seed, total, num_frames, frame_interval, want in rows:
        last = last_crop_start(total, num_frames, frame_interval)
        start = random.Random(seed).randint(0, last)
        try:
            got = temporal_crop(total, num_frames, frame_interval, start)
        except KinemaError:
            assert isinstance(want, dict), f"seed {seed}: refused, the original is not: {want}"
            continue
        assert got == want, f"seed {seed}: {got} != {want}"
