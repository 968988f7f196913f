"""What is known about a media file without decoding all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VIDEO_SUFFIXES = frozenset(
    {
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".flv",
        ".wmv",
        ".gif",
    }
)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """Facts about one file, as the manifest needs them."""

    kind: Literal["video", "image"]
    num_frames: int
    """Frames that decoding yields; 1 for an image."""
    width: int
    """Pixels as displayed, after rotation."""
    height: int
    """Pixels as displayed, after rotation."""
    fps: float
    """Frames per second, on average; 0 where undefined (images, a frame without duration)."""
    duration_s: float
    """From the first frame to the end of the last; 0 for an image."""
    codec: str
    rotation: int
    """Clockwise degrees (0, 90, 180, 270) that turn the stored picture into the displayed one."""
    variable_rate: bool
    """True if frames are not evenly spaced in time."""
    file_size: int
    """Bytes."""
