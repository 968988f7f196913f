"""What looks at the frames of a video while they are decoded once for all.

The pass (`look.py`) decodes a source once and hands every frame to each analyzer that was asked
for. An analyzer keeps *signals*: arrays of one value per frame (or per sampled frame), written to
one `.npz` for a source. Clips are found from signals afterwards (`segment.py`), and their columns
are aggregates of the signals between its first and last frame: other thresholds or lengths
decode nothing again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Picture = np.ndarray[Any, np.dtype[np.uint8]]
Signal = np.ndarray[Any, np.dtype[Any]]
SMALL = 320
"""Pixels of the longer side of the reduced pictures (less where the video is smaller)."""


class FrameView(Protocol):
    """One decoded frame; everything is made when first asked for and shared by the analyzers.

    Pictures are as stored (rotation flags not applied: nothing here depends on it but labels of
    camera motion and borders, which `segment.py` turns)."""

    @property
    def index(self) -> int:
        """Place in presentation order, from 0."""
        ...

    @property
    def time_s(self) -> float:
        """Seconds after the first frame."""
        ...

    @property
    def luma(self) -> Picture:
        """`[H, W]` at full size, limited or full range as stored; may share the decoder's memory:
        it is not to be kept or written to."""
        ...

    @property
    def full_range(self) -> bool:
        """Whether `luma` is 0..255; else it is 16..235."""
        ...

    @property
    def small(self) -> Picture:
        """`[h, w]` luma reduced by averaging to `SMALL`, full range 0..255."""
        ...

    @property
    def small_bgr(self) -> Picture:
        """`[h, w, 3]`, the same size in colour, as OpenCV orders it."""
        ...

    @property
    def motion_vectors(self) -> Signal | None:
        """The codec's own, as FFmpeg's `AVMotionVector` fields (`src_x, src_y, dst_x, dst_y, w, h,
        source, motion_x, motion_y, motion_scale`); empty for a key frame, None where the codec
        exports none."""
        ...


class Analyzer(Protocol):
    """Looks at the frames of one source, in presentation order, each once."""

    def frame(self, view: FrameView) -> None: ...

    def signals(self) -> dict[str, Signal]:
        """After the last frame. Arrays over frames have length N; arrays over sampled frames come
        with `frames` [M], their places."""
        ...


class ClipColumns(Protocol):
    """Turns signals into a clip's columns."""

    def __call__(self, signals: Mapping[str, Signal], start: int, end: int) -> dict[str, Any]:
        """Args:
        signals: as the analyzer gave them, for the whole source.
        start: the clip's first frame.
        end: the frame after its last.
        """
        ...
