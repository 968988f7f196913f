"""Writing videos and images, completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from PIL import Image

from kinema.config.errors import KinemaError

if TYPE_CHECKING:  # decode workers import this room without torch
    from torch import Tensor

MAX_GOP = 30
"""Frames between key frames: what a random access has to decode at most."""


def write_video(
    path: str | os.PathLike[str],
    frames: np.ndarray[Any, Any] | Tensor,
    fps: float | Fraction,
    *,
    crf: int = 18,
) -> None:
    """Write an H.264 mp4 (yuv420p, BT.709, index in front) that plays in browsers.

    The same frames give the same bytes. The file appears complete or not at all.

    Args:
        path: ends in `.mp4`; an existing file is replaced.
        frames: uint8 `[T, H, W, 3]`, or float `[3, T, H, W]` in [-1, 1] (beyond: cut off).
        fps: frames per second.
        crf: quality from 0 (lossless) to 51; 18 is hard to tell from the original.

    Raises:
        KinemaError: wrong shape or type, no frames, an odd height or width, a wrong `fps` or `crf`.
        OSError: the folder or the disk.
    """
    target = Path(path)
    if target.suffix.lower() != ".mp4":
        raise KinemaError("videos are written as .mp4", where=str(target))
    pixels = _video_pixels(frames, where=str(target))
    rate = Fraction(fps).limit_denominator(1001)
    if rate <= 0:
        raise KinemaError(f"fps is {fps}, must be above 0", where=str(target))
    if not 0 <= crf <= 51:
        raise KinemaError(f"crf is {crf}, must be in 0..51", where=str(target))
    with atomic_output(target) as temporary:
        _encode(temporary, pixels, rate, crf)


def write_image(path: str | os.PathLike[str], image: np.ndarray[Any, Any] | Tensor) -> None:
    """Write a png.

    Args:
        path: ends in `.png`; an existing file is replaced.
        image: uint8 `[H, W, 3]`, or float `[3, H, W]` in [-1, 1] (values beyond are cut off).

    Raises:
        KinemaError: wrong shape or type.
        OSError: the folder or the disk.
    """
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise KinemaError("images are written as .png", where=str(target))
    pixels = _to_uint8(image, dims=3, where=str(target))
    with atomic_output(target) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


@contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder; takes `path`'s place if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(path: Path, pixels: np.ndarray[Any, Any], rate: Fraction, crf: int) -> None:
    _, height, width, _ = pixels.shape
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        options = {"crf": str(crf), "preset": "medium", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.gop_size = MAX_GOP
        # x264's bytes depend on its number of threads and, without cpu-independent, on what lies
        # beside its buffers (AVX-512 code of the macroblock tree).
        context.thread_count = 1
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
        for index, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


_BT709 = 1
_LIMITED = 1


def _video_pixels(frames: np.ndarray[Any, Any] | Tensor, *, where: str) -> np.ndarray[Any, Any]:
    pixels = _to_uint8(frames, dims=4, where=where)
    count, height, width, _ = pixels.shape
    if count == 0:
        raise KinemaError("a video needs at least one frame", where=where)
    if height % 2 or width % 2:
        raise KinemaError(
            f"{width}x{height} has an odd side, which H.264 with yuv420p cannot hold",
            where=where,
            hint=f"crop to {width // 2 * 2}x{height // 2 * 2}",
        )
    return pixels


def _to_uint8(
    values: np.ndarray[Any, Any] | Tensor, *, dims: int, where: str
) -> np.ndarray[Any, Any]:
    """uint8 with channels last, from that or from floats in [-1, 1] with channels first."""
    array = values if isinstance(values, np.ndarray) else values.detach().float().cpu().numpy()
    wanted = "uint8 [..., H, W, 3] or float [3, ..., H, W] in [-1, 1]"
    if array.ndim == dims and array.dtype == np.uint8 and array.shape[-1] == 3:
        return np.ascontiguousarray(array)
    if array.ndim == dims and array.dtype.kind == "f" and array.shape[0] == 3:
        if not np.isfinite(array).all():
            raise KinemaError("the pixels are not all finite", where=where)
        scaled = np.rint((np.clip(array, -1, 1).astype(np.float32) + 1) * 127.5)
        return np.ascontiguousarray(np.moveaxis(scaled, 0, -1).astype(np.uint8))
    raise KinemaError(f"pixels are {array.dtype} {array.shape}, not {wanted}", where=where)
