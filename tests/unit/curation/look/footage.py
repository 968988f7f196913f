"""Rendered footage whose motion, sharpness and borders are known, and how analyzers see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from kinema.curation.config import MotionConfig, QualityConfig
from kinema.curation.look.analyzer import Analyzer, Picture, Signal
from kinema.curation.look.frame_view import small_size
from kinema.curation.look.look import watch
from kinema.curation.look.motion import MotionAnalyzer, motion_columns
from kinema.curation.look.probe import SourceInfo
from kinema.curation.look.quality import QualityAnalyzer, quality_columns

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class GreyView:
    """A `FrameView` of a grey picture of full range, without a file."""

    luma: Picture
    index: int
    time_s: float
    full_range: bool = True
    motion_vectors: Signal | None = None

    @property
    def small(self) -> Picture:
        height, width = small_size(*self.luma.shape)
        reduced: Any = cv2.resize(self.luma, (width, height), interpolation=cv2.INTER_AREA)
        return reduced

    @property
    def small_bgr(self) -> Picture:
        grey: Any = cv2.cvtColor(self.small, cv2.COLOR_GRAY2BGR)
        return grey


def info_of(frames: Array, fps: float, rotation: int = 0) -> SourceInfo:
    count, height, width = frames.shape
    return SourceInfo(
        stored_width=width,
        stored_height=height,
        rotation=rotation,
        num_frames=count,
        fps=fps,
        duration=count / fps,
        codec="rawvideo",
        bit_rate=0,
        audio=False,
        variable_rate=False,
        file_size=0,
    )


def look(analyzer: Analyzer, frames: Iterable[Picture], fps: float) -> dict[str, Signal]:
    """An analyzer's signals of grey frames `[N, H, W]`."""
    cv2.setNumThreads(1)
    for index, picture in enumerate(frames):
        analyzer.frame(GreyView(picture, index, index / fps))
    return analyzer.signals()


def motion_of(frames: Array, fps: float = 30.0, **settings: float) -> dict[str, Any]:
    analyzer = MotionAnalyzer(MotionConfig(**settings), info_of(frames, fps))
    return motion_columns(look(analyzer, frames, fps), 0, len(frames))


def quality_of(frames: Array, fps: float = 30.0, **settings: float) -> dict[str, Any]:
    analyzer = QualityAnalyzer(QualityConfig(**settings), info_of(frames, fps))
    return quality_columns(look(analyzer, frames, fps), 0, len(frames))


def columns_of_file(
    path: Path,
    make: Callable[[SourceInfo], Analyzer],
    columns: Callable[[dict[str, Signal], int, int], dict[str, Any]],
) -> dict[str, Any]:
    """Of a whole file, by the pass itself."""
    cv2.setNumThreads(1)
    seen = watch(path, lambda info: {"it": make(info)})
    return columns(seen.signals["it"], 0, len(seen.damaged))


def motion_of_file(path: Path) -> dict[str, Any]:
    return columns_of_file(path, lambda i: MotionAnalyzer(MotionConfig(), i), motion_columns)


def quality_of_file(path: Path) -> dict[str, Any]:
    return columns_of_file(path, lambda i: QualityAnalyzer(QualityConfig(), i), quality_columns)


def texture(height: int, width: int, seed: int = 0) -> Picture:
    """Blobs of several sizes, 0..255: something to follow everywhere."""
    draw = np.random.default_rng(seed)
    total = np.zeros((height, width), np.float32)
    for size in (5, 13, 41):
        coarse = draw.normal(size=(height // size + 2, width // size + 2)).astype(np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    low, high = np.percentile(total, [2, 98])
    return np.clip((total - low) / (high - low) * 215 + 20, 0, 255).astype(np.uint8)


def camera(
    count: int,
    size: tuple[int, int] = (180, 320),
    *,
    right: Callable[[int], float] = lambda t: 0.0,
    up: Callable[[int], float] = lambda t: 0.0,
    zoom: Callable[[int], float] = lambda t: 1.0,
    roll: Callable[[int], float] = lambda t: 0.0,
    seed: int = 0,
) -> Array:
    """`[count, H, W]` of a large textured wall, seen by a camera that has moved by so many pixels,
    zoomed by a factor and rolled clockwise by so many degrees at frame t."""
    height, width = size
    wall = texture(4 * height, 4 * width, seed)
    frames = []
    for t in range(count):
        # Where the picture's pixels lie on the wall.
        angle, scale = np.deg2rad(roll(t)), 1 / zoom(t)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre = np.array([2 * width + right(t), 2 * height - up(t)])
        shift = centre - turn @ np.array([(width - 1) / 2, (height - 1) / 2])
        matrix = np.column_stack([turn, shift])
        how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        frames.append(cv2.warpAffine(wall, matrix, (width, height), flags=how))
    return np.stack(frames)


def rgb(frames: Array) -> Array:
    """`[N, H, W, 3]` of grey frames."""
    return np.repeat(frames[..., None], 3, axis=3)


def encode(
    path: Path, frames: Array, fps: int = 30, codec: str = "libx264", **options: str
) -> Path:
    """Grey frames `[N, H, W]` as a file, by any codec."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for index, picture in enumerate(rgb(frames)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
