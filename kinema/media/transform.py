"""Bringing pictures to a model's size, by the rules of Open-Sora 1.2.

All of it in NumPy, so that decode workers need no torch. Pictures come in as uint8 RGB with
channels last and leave as float32 in [-1, 1] with channels first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from kinema.config.errors import KinemaError

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


def resize_crop(frames: Pixels, size: tuple[int, int]) -> Floats:
    """Scale until the frame covers `size`, then cut out the middle.

    Bilinear on floats without antialias (sample points at pixel centres).

    Args:
        frames: `[T, H, W, 3]`.
        size: (height, width).

    Returns:
        `[3, T, height, width]`.
    """
    scaled_size = covering_size(frames.shape[1:3], size)
    top, left = (int(round(s - t) / 2) for s, t in zip(scaled_size, size, strict=True))
    down, across = (h / s for h, s in zip(frames.shape[1:3], scaled_size, strict=True))
    return _normalise(_bilinear(frames, (down, across), (top, left), size))


def center_crop(frames: Pixels, side: int) -> Floats:
    """Scale the short side to `side`, then cut a square out of the middle (for UCF-101).

    Args:
        frames: `[T, H, W, 3]`.
        side: height and width of the result.

    Returns:
        `[3, T, side, side]`.
    """
    height, width = frames.shape[1:3]
    factor = side / min(height, width)
    top, left = (round((int(s * factor) - side) / 2) for s in (height, width))
    return _normalise(_bilinear(frames, (1 / factor, 1 / factor), (top, left), (side, side)))


def image_resize_crop(image: Pixels, size: tuple[int, int]) -> Floats:
    """`resize_crop` for images: Pillow's bicubic, halves of the offset rounded to even.

    Args:
        image: `[H, W, 3]`.
        size: (height, width).

    Returns:
        `[3, 1, height, width]`.
    """
    scaled_size = covering_size(image.shape[:2], size)
    scaled = _resize_image(Image.fromarray(image), scaled_size)
    top, left = (round((s - t) / 2) for s, t in zip(scaled_size, size, strict=True))
    return _normalise(scaled[None, top : top + size[0], left : left + size[1]])


def image_center_crop(image: Pixels, side: int) -> Floats:
    """Halve by box filter while twice too large, go to the short side `side`, cut out the middle.

    Args:
        image: `[H, W, 3]`.
        side: height and width of the result.

    Returns:
        `[3, 1, side, side]`.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * side:
        half = (picture.width // 2, picture.height // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    factor = side / min(picture.size)
    scaled_size = (round(picture.height * factor), round(picture.width * factor))
    scaled = _resize_image(picture, scaled_size)
    top, left = ((s - side) // 2 for s in scaled_size)
    return _normalise(scaled[None, top : top + side, left : left + side])


VIDEO_TRANSFORMS: dict[str, Callable[[Pixels, tuple[int, int]], Floats]] = {
    "resize_crop": resize_crop,
}
IMAGE_TRANSFORMS: dict[str, Callable[[Pixels, tuple[int, int]], Floats]] = {
    "resize_crop": image_resize_crop,
}


def last_crop_start(total: int, num_frames: int, frame_interval: int = 1) -> int:
    """The largest start that 1.2 draws for a temporal crop; the smallest is 0."""
    return max(0, total - num_frames * frame_interval - 1)


def temporal_crop(total: int, num_frames: int, frame_interval: int, start: int) -> list[int]:
    """Frames of a temporal crop: evenly spread over a window of `num_frames * frame_interval`.

    A clip shorter than the window but not than `num_frames` is sampled more densely.

    Args:
        total: frames of the clip.
        num_frames: frames wanted.
        frame_interval: every how many-th frame.
        start: the draw, in 0..`last_crop_start(total, num_frames, frame_interval)`.

    Raises:
        KinemaError: the clip has fewer than `num_frames` frames.
    """
    end = min(start + num_frames * frame_interval, total)
    if end - start < num_frames:
        raise KinemaError(f"{num_frames} frames wanted from frame {start} of a clip of {total}")
    return [int(i) for i in np.linspace(start, end - 1, num_frames, dtype=int)]


def covering_size(have: tuple[int, ...], want: tuple[int, int]) -> tuple[int, int]:
    """(height, width) with the shape of `have` that covers `want` and meets one side of it."""
    (height, width), (to_height, to_width) = have, want
    by_height, by_width = to_height / height, to_width / width
    if by_height > by_width:
        return to_height, round(width * by_height)
    return round(height * by_width), to_width


def _bilinear(
    frames: Pixels, ratios: tuple[float, float], offset: tuple[int, int], size: tuple[int, int]
) -> Floats:
    """The part of the scaled frames that starts at `offset` and has `size`, and only that part.

    Args:
        frames: `[T, H, W, 3]`.
        ratios: source pixels per scaled pixel, (down, across).
        offset: (top, left) in scaled pixels.
        size: (height, width).

    Returns:
        `[T, height, width, 3]` in 0..255.
    """
    rows = _along(frames, 1, ratios[0], offset[0], size[0])
    return _along(rows, 2, ratios[1], offset[1], size[1])


def _along(values: np.ndarray[Any, Any], axis: int, ratio: float, offset: int, want: int) -> Floats:
    """Interpolate along one axis: each new pixel lies between two old ones."""
    have = values.shape[axis]
    # Rounded where PyTorch's float32 kernel (with fused multiply-add) rounds: finer positions would
    # differ from its result by more and more towards the far edges of large pictures.
    source = (np.arange(offset, offset + want) + 0.5) * np.float64(np.float32(ratio)) - 0.5
    source = np.maximum(source.astype(np.float32), 0)
    first = np.minimum(source.astype(np.int64), have - 1)
    second = np.minimum(first + 1, have - 1)
    weight = (source - first.astype(np.float32)).reshape(-1, *[1] * (values.ndim - axis - 1))
    low = values.take(first, axis).astype(np.float32, copy=False)
    result: Floats = values.take(second, axis) - low
    result *= weight
    result += low
    return result


def _resize_image(picture: Image.Image, size: tuple[int, int]) -> Pixels:
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _normalise(frames: np.ndarray[Any, Any]) -> Floats:
    """`[T, H, W, 3]` in 0..255 -> `[3, T, H, W]` in [-1, 1]."""
    result = np.ascontiguousarray(frames.transpose(3, 0, 1, 2), dtype=np.float32)
    result /= 127.5
    result -= 1
    np.clip(result, -1, 1, out=result)  # interpolated values may go beyond by one bit
    return result
