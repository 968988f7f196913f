"""From a file to what a model trains on: chosen frames at the model's size.

Runs in decode workers, so it must import without torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kinema.media.image import read_image
from kinema.media.read import iter_frames
from kinema.media.stores import Place
from kinema.media.transform import IMAGE_TRANSFORMS, VIDEO_TRANSFORMS, Floats


def load_clip(
    path: Place,
    indices: Sequence[int],
    size: tuple[int, int],
    transform: str = "resize_crop",
) -> Floats:
    """Frames of a video, transformed one at a time as they are decoded.

    Args:
        path: a video file.
        indices: places in presentation order, ascending, each once.
        size: (height, width).
        transform: a key of `VIDEO_TRANSFORMS`.

    Returns:
        float32 `[3, len(indices), height, width]` in [-1, 1].

    Raises:
        MediaError: the file cannot be used, or has fewer frames (`too_short`).
    """
    result = np.empty((3, len(indices), *size), np.float32)
    slots = {position: slot for slot, position in enumerate(indices)}
    for position, picture in iter_frames(path, indices):
        result[:, slots[position]] = VIDEO_TRANSFORMS[transform](picture[None], size)[:, 0]
    return result


def load_frames(
    path: Place,
    indices: Sequence[int] | None,
    size: tuple[int, int],
    transform: str = "resize_crop",
) -> Floats:
    """`load_clip`, or `load_image` where `indices` is None: one call for a mixed list."""
    if indices is None:
        return load_image(path, size, transform)
    return load_clip(path, indices, size, transform)


def load_image(path: Place, size: tuple[int, int], transform: str = "resize_crop") -> Floats:
    """An image as a clip of one frame.

    Args:
        path: an image file.
        size: (height, width).
        transform: a key of `IMAGE_TRANSFORMS`.

    Returns:
        float32 `[3, 1, height, width]` in [-1, 1].

    Raises:
        MediaError: the file cannot be used.
    """
    return IMAGE_TRANSFORMS[transform](read_image(path), size)
