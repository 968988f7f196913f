"""Writing a part of a video anew: cut exactly, upright, with a key frame every few frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av import VideoFrame

from kinema.curation.picture import Shape
from kinema.media.frame_index import FrameIndex

FASTEST = 240.0
"""Frames per second at most of what was recorded at a variable rate: frames that come in pairs a
millisecond apart do not mean a thousand a second."""
SLOWEST = Fraction(1, 1001)


@dataclass(frozen=True)
class Timing:
    """Which frame of the source each frame of the clip shows, at a constant rate."""

    rate: Fraction
    """Frames per second."""
    places: np.ndarray[Any, np.dtype[np.int64]]
    """`[n]` ascending; repeats where the source shows one frame for longer."""


def even_timing(start: int, end: int, fps: float) -> Timing:
    """Of a source with a constant rate: its frames as they are."""
    return Timing(_fraction(fps), np.arange(start, end))


def resampled_timing(index: FrameIndex, start: int, end: int) -> Timing:
    """Of a source with a variable rate: at the rate of most of its frames, with those shown
    longer repeated, so that things move as fast as they did, whoever reads the clip by frame
    numbers.

    Args:
        index: of the source.
        start: first frame.
        end: the frame after the last.
    """
    times = np.append(index.times[start:end], index.times[end] if end < len(index) else index.end)
    steps = np.diff(times)
    base = float(index.time_base)
    if len(steps) < 2 or not index.timed or np.ptp(steps) <= max(2, 0.01 * steps.mean()):
        duration = float(times[-1] - times[0]) * base
        return even_timing(start, end, len(steps) / duration if duration else 0.0)
    duration = float(times[-1] - times[0]) * base
    fastest = max(FASTEST, len(steps) / duration)
    step = max(float(np.median(steps)) * base, 1 / fastest)
    count = max(1, round(duration / step))
    rate = _fraction(1 / step)
    # A moment that meets a frame's start but for rounding belongs to that frame.
    moments = np.arange(count) / float(rate) / base + 0.5 + float(times[0])
    found = np.searchsorted(times[:-1], moments, side="right") - 1
    return Timing(rate, start + np.clip(found, 0, end - start - 1))


def encode(
    path: Path,
    frames: Iterable[tuple[int, VideoFrame]],
    timing: Timing,
    shape: Shape,
    *,
    crf: int,
    preset: str,
    gop: int,
) -> None:
    """Write an H.264 mp4 (yuv420p, index in front), one frame at a time.

    The same frames give the same bytes.

    Args:
        path: ends in `.mp4`.
        frames: `(place, frame)` for each of `timing.places` once, ascending.
        timing: when they are shown.
        shape: what is done to them.
        crf: x264's quality, 0 (lossless) to 51.
        preset: x264's.
        gop: frames from one key frame to the next, at most.
    """
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        options = {"crf": str(crf), "preset": preset, "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=timing.rate, options=options)
        stream.width, stream.height, stream.pix_fmt = shape.width, shape.height, "yuv420p"
        context = stream.codec_context
        context.gop_size = gop
        # x264's bytes depend on its number of threads (see kinema.media.write).
        context.thread_count = 1
        for number, picture in enumerate(_in_time(frames, timing, shape)):
            if number == 0:
                context.colorspace, context.color_range = picture.colorspace, picture.color_range
                context.color_primaries = picture.color_primaries
                context.color_trc = picture.color_trc
            picture.pts, picture.time_base = number, 1 / timing.rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _in_time(
    frames: Iterable[tuple[int, VideoFrame]], timing: Timing, shape: Shape
) -> Iterator[VideoFrame]:
    counts = dict(zip(*(a.tolist() for a in np.unique(timing.places, return_counts=True)),
                      strict=True))  # fmt: skip
    for place, frame in frames:
        picture = shape.apply(frame)
        for _ in range(counts[place]):
            yield picture


def _fraction(fps: float) -> Fraction:
    """Frames per second as containers write them (30000/1001 for 29.97); of a single picture, which
    has none, 25."""
    return Fraction(fps).limit_denominator(1001) or SLOWEST if fps > 0 else Fraction(25)
