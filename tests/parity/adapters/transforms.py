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
    side = case.config["center_size"]
    results = {
        "out.resize_crop": lambda: resize_crop(frames, (height, width)).swapaxes(0, 1),
        "out.image_resize_crop": lambda: image_resize_crop(frames[0], (height, width))[:, 0],
        "out.center": lambda: center_crop(frames, side).swapaxes(0, 1),
        "out.image_center": lambda: image_center_crop(frames[0], side)[:, 0],
    }
    for name, compute in results.items():
        if case.has(name):
            case.check(name, torch.from_numpy(compute()))


@adapter(r"temporal_random_crop")
def temporal_random_crop(case: Case) -> None:
    for seed, total, num_frames, frame_interval, want in case.table()["rows"]:
        last = last_crop_start(total, num_frames, frame_interval)
        start = random.Random(seed).randint(0, last)
        try:
            got = temporal_crop(total, num_frames, frame_interval, start)
        except KinemaError:
            assert isinstance(want, dict), f"seed {seed}: refused, the original is not: {want}"
            continue
        assert got == want, f"seed {seed}: {got} != {want}"
