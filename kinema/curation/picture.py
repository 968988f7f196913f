"""From a decoded frame to the picture of a clip: upright, without borders, square pixels,
yuv420p."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from av import VideoFrame
from av.video.frame import PictureType

_LIMITED = 1
_TAGS = "colorspace", "color_range", "color_primaries", "color_trc"


@dataclass(frozen=True)
class Crop:
    """Pixels to leave out of the displayed picture."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


@dataclass(frozen=True)
class Shape:
    """What is done to every frame of a clip. Sides are even: yuv420p has no others.

    Frames of a file that changes its resolution come in the size of the first.
    """

    crop: Crop
    height: int
    width: int

    @classmethod
    def of(
        cls,
        height: int,
        width: int,
        crop: Crop,
        max_side: int | None,
        pixel_aspect: float = 1.0,
    ) -> Shape:
        """Args:
        height: pixels as displayed.
        width: pixels as displayed.
        crop: borders; those that are odd lose a pixel more.
        max_side: pixels of the shorter side at most.
        pixel_aspect: width of a pixel by its height: the picture becomes larger in one direction,
            so that pixels are square.
        """
        even = Crop(crop.top + crop.top % 2, crop.bottom, crop.left + crop.left % 2, crop.right)
        rest_h = max(2, (height - even.top - even.bottom) // 2 * 2)
        rest_w = max(2, (width - even.left - even.right) // 2 * 2)
        square_h = rest_h / min(1.0, pixel_aspect)
        square_w = rest_w * max(1.0, pixel_aspect)
        scale = min(1.0, (max_side or math.inf) / min(square_h, square_w))
        return cls(
            even,
            max(2, round(square_h * scale / 2) * 2),
            max(2, round(square_w * scale / 2) * 2),
        )

    def apply(self, frame: VideoFrame) -> VideoFrame:
        """The picture, without a time of its own. yuv420p of limited range keeps its values and
        what they mean (also where the file does not say); everything else becomes BT.709."""
        turns = round(frame.rotation / 90) % 4
        if frame.format.name != "yuv420p" or int(frame.color_range) not in (0, _LIMITED):
            made = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        else:
            made = frame
        height, width = self.height, self.width
        rest_h, rest_w = self._rest(made, turns)
        if turns or (made.height, made.width) != (rest_h, rest_w):
            made = self._cut(made, turns, rest_h, rest_w)
        if (made.height, made.width) != (height, width):
            made = made.reformat(width=width, height=height, interpolation="BICUBIC")
        if made is frame:
            # The decoder's own picture types would be orders to the encoder.
            frame.pict_type = PictureType.NONE
        return made

    def _rest(self, frame: VideoFrame, turns: int) -> tuple[int, int]:
        height, width = (frame.height, frame.width)[:: -1 if turns % 2 else 1]
        crop = self.crop
        return (
            max(2, (height - crop.top - crop.bottom) // 2 * 2),
            max(2, (width - crop.left - crop.right) // 2 * 2),
        )

    def _cut(self, frame: VideoFrame, turns: int, height: int, width: int) -> VideoFrame:
        top, left = self.crop.top, self.crop.left
        parts: list[Any] = []
        for number, step in ((0, 1), (1, 2), (2, 2)):
            plane: Any = frame.planes[number]
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            upright = np.rot90(rows[: plane.height, : plane.width], turns)
            part = upright[top // step :, left // step :][: height // step, : width // step]
            parts.append(np.ascontiguousarray(part).reshape(-1))
        made = VideoFrame.from_ndarray(
            np.concatenate(parts).reshape(height * 3 // 2, width), format="yuv420p"
        )
        for tag in _TAGS:
            setattr(made, tag, getattr(frame, tag))
        return made
