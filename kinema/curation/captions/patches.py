"""Frames as the image side of Qwen's vision-language models takes them.

transformers has this for videos in torchvision only; here it is with Pillow and NumPy. The order of
values is that of Qwen2-VL (arXiv 2409.12191, section 2.1): patches of `temporal` frames of
`patch` × `patch` pixels, those that are merged into one token next to each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kinema.config.errors import KinemaError

Floats = np.ndarray[Any, np.dtype[np.float32]]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST_RATIO = 200
"""Sides of a picture that the models take at most."""


@dataclass(frozen=True)
class PatchSettings:
    """Sizes and constants of a model."""

    patch: int = 14
    temporal: int = 2
    merge: int = 2
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    least: int = 56 * 56
    """Pixels of a picture; smaller ones are enlarged."""
    most: int = 28 * 28 * 1280
    """Larger ones are shrunk."""

    @classmethod
    def read(cls, folder: Path, vision: Mapping[str, Any]) -> PatchSettings:
        """Of a model's folder.

        Args:
            vision: `vision_config` of its `config.json`: the sizes that its weights have.

        Raises:
            KinemaError: the settings of the image preprocessing cannot be read.
        """
        found: dict[str, Any] = {}
        for name in ("processor_config.json", "preprocessor_config.json"):
            file = folder / name
            try:
                content = json.loads(file.read_text()) if file.is_file() else {}
                found |= content.get("image_processor", content)
            except (ValueError, AttributeError, TypeError) as error:
                raise KinemaError(f"is not readable: {error}", where=str(file)) from None
        size = found.get("size") or {}
        default = cls()
        try:
            return cls(
                int(vision.get("patch_size", found.get("patch_size", default.patch))),
                int(vision.get("temporal_patch_size", default.temporal)),
                int(vision.get("spatial_merge_size", default.merge)),
                tuple(float(v) for v in found.get("image_mean", default.mean)),
                tuple(float(v) for v in found.get("image_std", default.std)),
                int(found.get("min_pixels") or size.get("shortest_edge") or default.least),
                int(found.get("max_pixels") or size.get("longest_edge") or default.most),
            )
        except (ValueError, TypeError) as error:
            raise KinemaError(
                f"the settings of the image preprocessing cannot be read: {error}",
                where=str(folder),
            ) from None

    @property
    def tokens_side(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.merge


def fitted(height: int, width: int, settings: PatchSettings) -> tuple[int, int]:
    """The size (height, width) that a picture is scaled to: whole tokens, between `least` and
    `most` pixels, as near to its shape as that allows."""
    side = settings.tokens_side
    down, across = round(height / side) * side, round(width / side) * side
    if down * across > settings.most:
        shrink = math.sqrt(height * width / settings.most)
        down = max(side, math.floor(height / shrink / side) * side)
        across = max(side, math.floor(width / shrink / side) * side)
    elif down * across < settings.least:
        grow = math.sqrt(settings.least / (height * width))
        down = math.ceil(height * grow / side) * side
        across = math.ceil(width * grow / side) * side
    return down, across


def patches(
    frames: Sequence[np.ndarray[Any, np.dtype[np.uint8]]], settings: PatchSettings
) -> tuple[Floats, tuple[int, int, int]]:
    """One picture, or the frames of one video, as rows of patches.

    Args:
        frames: RGB `[H, W, 3]`, all of one size; the last one is repeated until `temporal` divides
            their number.

    Returns:
        float32 `[t·h·w, 3·temporal·patch·patch]`, and the grid (t, h, w) in patches.
    """
    down, across = fitted(frames[0].shape[0], frames[0].shape[1], settings)
    scaled = [
        np.asarray(Image.fromarray(f).resize((across, down), Image.Resampling.BICUBIC))
        for f in frames
    ]
    scaled += [scaled[-1]] * (-len(scaled) % settings.temporal)
    values = np.stack(scaled).astype(np.float32) / np.float32(255)
    mean, std = (np.array(three, np.float32) for three in (settings.mean, settings.std))
    values = (values - mean) / std
    side, merge = settings.patch, settings.merge
    grid = (len(scaled) // settings.temporal, down // side, across // side)
    split = values.reshape(
        grid[0], settings.temporal, grid[1] // merge, merge, side, grid[2] // merge, merge, side, 3
    )
    # t, h, w, merged h, merged w, colour, frame, y, x
    ordered = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return ordered.reshape(math.prod(grid), -1), grid
