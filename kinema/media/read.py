"""Reading chosen frames of a video, exactly, without decoding the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np


def read_frames(
    path: str | os.PathLike[str],
    indices: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray[Any, Any]:
    """Frames by their place in presentation order.

    Args:
        path: a video file.
        indices: from 0, in any order, repeats allowed; None reads all frames.
        size: (height, width) to scale to (bicubic, in the decoder), as displayed.

    Returns:
        uint8 RGB `[len(indices), H, W, 3]`, upright, in the order asked for.

    Raises:
        MediaError: the file cannot be used, or has fewer frames (`too_short`).
    """
    raise NotImplementedError


def read_at_fps(
    path: str | os.PathLike[str],
    fps: float,
    num_frames: int,
    start_s: float = 0.0,
    size: tuple[int, int] | None = None,
) -> np.ndarray[Any, Any]:
    """`num_frames` pictures shown at `start_s + i / fps`, whatever the file's own frame rate.

    Returns:
        uint8 RGB `[num_frames, H, W, 3]`, upright.
    """
    raise NotImplementedError


def read_image(
    path: str | os.PathLike[str], size: tuple[int, int] | None = None
) -> np.ndarray[Any, Any]:
    """An image, upright (EXIF rotation applied).

    Args:
        path: an image file.
        size: (height, width) to scale to (bicubic).

    Returns:
        uint8 RGB `[H, W, 3]`.
    """
    raise NotImplementedError
