"""What a source is: size, rate, length, codec, and so on, with one frame decoded at most."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from av import VideoFrame

from kinema.media.container import OpenVideo
from kinema.media.frame_index import FrameIndex
from kinema.media.probe import average_rate

VERSION = 2
COLUMNS: dict[str, pa.DataType] = {
    "width": pa.int32(),
    "height": pa.int32(),
    "aspect_ratio": pa.float64(),
    "num_frames": pa.int64(),
    "fps": pa.float64(),
    "duration": pa.float64(),
    "codec": pa.string(),
    "bit_rate": pa.int64(),
    "rotation": pa.int32(),
    "audio": pa.bool_(),
    "variable_rate": pa.bool_(),
    "file_size": pa.int64(),
    "pixel_aspect": pa.float64(),
}
NEARLY_SQUARE = 0.01
"""Pixels whose sides differ by at most this share count as square: rounding of encoders."""
MOST_OBLONG = 4.0
"""Sides of pixels that differ by more are no statement but a mistake in the file."""


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """Facts about a source, as the analyzers and the part `probe` need them."""

    stored_width: int
    """Pixels as stored: what `FrameView.luma` has."""
    stored_height: int
    rotation: int
    """Clockwise degrees (0, 90, 180, 270) that turn the stored picture into the displayed one."""
    num_frames: int
    fps: float
    """Frames per second, on average; 0 where undefined."""
    duration: float
    """Seconds from the first frame to the end of the last."""
    codec: str
    bit_rate: int
    """Bits per second: of the video stream where the file says so, else of the whole file."""
    audio: bool
    variable_rate: bool
    file_size: int
    pixel_aspect: float = 1.0
    """Width of a pixel by its height, as displayed; 1 where the file does not say."""

    @property
    def width(self) -> int:
        """Pixels as displayed."""
        return self.stored_height if self.rotation % 180 else self.stored_width

    @property
    def height(self) -> int:
        """Pixels as displayed."""
        return self.stored_width if self.rotation % 180 else self.stored_height

    def columns(self) -> dict[str, Any]:
        """The columns of the part `probe`."""
        values = asdict(self)
        del values["stored_width"], values["stored_height"]
        values.update(width=self.width, height=self.height, aspect_ratio=self.height / self.width)
        return {name: values[name] for name in COLUMNS}


def describe(video: OpenVideo, index: FrameIndex, first: VideoFrame) -> SourceInfo:
    """From an open file, its index and its first decoded frame."""
    stream = video.stream
    duration = index.duration_s
    bit_rate = stream.bit_rate or video.container.bit_rate or 0
    if not bit_rate and duration > 0:
        bit_rate = round(video.file_size * 8 / duration)
    rotation = -round(first.rotation / 90) % 4 * 90
    return SourceInfo(
        stored_width=first.width,
        stored_height=first.height,
        rotation=rotation,
        num_frames=len(index),
        fps=average_rate(index, float(stream.average_rate or 0)),
        duration=duration,
        codec=stream.codec_context.name,
        bit_rate=int(bit_rate),
        audio=bool(video.container.streams.audio),
        variable_rate=index.variable_rate,
        file_size=video.file_size,
        pixel_aspect=pixel_aspect(float(stream.sample_aspect_ratio or 1), rotation),
    )


def pixel_aspect(stored: float, rotation: int) -> float:
    """Width of a displayed pixel by its height.

    Args:
        stored: the same of a stored pixel, as the file says; 0: it does not.
        rotation: degrees by which the picture is turned.
    """
    if not 1 / MOST_OBLONG <= stored <= MOST_OBLONG or abs(stored - 1) <= NEARLY_SQUARE:
        return 1.0
    return 1 / stored if rotation % 180 else stored
