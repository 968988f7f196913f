"""Small videos of many kinds for the tests, written with PyAV directly."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
CLOCK = Fraction(1, 12800)


def pictures(count: int, height: int = 32, width: int = 48) -> Pixels:
    """`[count, height, width, 3]`: a gradient with a block that moves, every frame another."""
    y, x = np.mgrid[0:height, 0:width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for t in range(count):
        frames[t] = np.stack([x * 4, y * 6, np.full_like(x, 7 * t % 256)], -1) % 256
        left = 3 * t % (width - 8)
        frames[t, 8:16, left : left + 8] = 255
    return frames


def write_clip(
    path: Path,
    frames: Pixels,
    *,
    times: list[int] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    mux: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Encode `frames`, shown at `times` (ticks of `CLOCK`; default: 25 per second)."""
    times = times or [512 * i for i in range(len(frames))]
    with av.open(str(path), "w", options=mux or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = CLOCK
        stream.codec_context.thread_count = 1
        stream.time_base = CLOCK
        if rotation:
            stream.set_display_rotation(rotation)
        for picture, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """An mp4 with sound alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decode_everything(path: Path) -> Pixels:
    """All frames as they come out, `[N, H, W, 3]`, not rotated: the plain truth to compare with."""
    with av.open(str(path)) as container:
        return np.stack(
            [
                f.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray()
                for f in container.decode(video=0)
            ]
        )
