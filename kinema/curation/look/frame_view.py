"""One decoded frame as the analyzers see it: planes without copies, small pictures made once."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import cv2
import numpy as np
from av import VideoFrame

from kinema.curation.look.analyzer import SMALL, Picture, Signal

EXPORTS_VECTORS = frozenset(
    ("h264", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "h263",
     "h263p", "flv", "flv1", "wmv1", "wmv2", "wmv3", "vc1", "rv10", "rv20", "rv30", "rv40", "cavs",
     "svq3")
)  # fmt: skip
"""Decoders of FFmpeg that give their motion vectors away (`flags2 +export_mvs`)."""

_PLANAR_8 = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "yuv440p"}
_DEEP = {
    f"yuv{layout}p{bits}le": bits - 8 for layout in (420, 422, 444) for bits in (9, 10, 12, 14, 16)
} | {f"gray{bits}le": bits - 8 for bits in (9, 10, 12, 14, 16)}
"""Formats of 16-bit little-endian samples -> bits beyond 8."""

# FFmpeg's AVColorSpace -> (red's share, blue's share) of luma; what is not named is taken for
# BT.601, as swscale does.
_LUMA_SHARES = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020
    10: (0.2627, 0.0593),
}
_BT601 = (0.299, 0.114)
_FULL_RANGE = 2

_STRETCH = np.clip(np.rint((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)
"""Limited range (16..235) -> full range."""


def small_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the reduced pictures of a video of this size."""
    scale = min(1.0, SMALL / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


class DecodedFrame:
    """A `FrameView` over a frame of PyAV.

    Args:
        frame: as the decoder gave it.
        index: place in presentation order.
        time_s: seconds after the first frame.
        size: (height, width) of the reduced pictures: one size for all of a file, even if the
            file changes its resolution.
        has_vectors: whether the codec exports motion vectors.
    """

    def __init__(
        self,
        frame: VideoFrame,
        index: int,
        time_s: float,
        size: tuple[int, int],
        has_vectors: bool,
    ) -> None:
        self.index = index
        self.time_s = time_s
        self._size = size
        self._frame = frame
        self._has_vectors = has_vectors

    def moved(self, index: int, time_s: float) -> DecodedFrame:
        """The same picture at another place, where a frame of the file is missing."""
        return DecodedFrame(self._frame, index, time_s, self._size, self._has_vectors)

    @cached_property
    def _readable(self) -> VideoFrame:
        """The frame in a format whose planes are known here."""
        name = self._frame.format.name
        if name in _PLANAR_8 or name in _DEEP or name in ("nv12", "nv21", "gray"):
            return self._frame
        return self._frame.reformat(
            format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG"
        )

    @cached_property
    def luma(self) -> Picture:
        plane = self._plane(0)
        extra = _DEEP.get(self._readable.format.name, 0)
        return plane if not extra else (plane >> extra).astype(np.uint8)

    @cached_property
    def _small_stored(self) -> Picture:
        """Reduced luma in the range that the file has."""
        return self._reduced(self._plane(0))

    @cached_property
    def small(self) -> Picture:
        if self.full_range:
            return self._small_stored
        stretched: Any = cv2.LUT(self._small_stored, _STRETCH)
        return stretched

    @cached_property
    def small_bgr(self) -> Picture:
        name = self._readable.format.name
        if name.startswith("gray"):
            grey: Any = cv2.cvtColor(self.small, cv2.COLOR_GRAY2BGR)
            return grey
        if name in ("nv12", "nv21"):
            both = self._reduced(self._plane(1))
            chroma = [both[..., 0], both[..., 1]][:: 1 if name == "nv12" else -1]
        else:
            chroma = [self._reduced(self._plane(1)), self._reduced(self._plane(2))]
        yuv = cv2.merge([self._small_stored, *chroma])
        shares = _LUMA_SHARES.get(int(self._frame.colorspace), _BT601)
        if self._readable is not self._frame:
            shares = _BT601  # what swscale converts to
        bgr: Any = cv2.transform(yuv, _to_bgr(shares, self.full_range))
        return bgr

    @property
    def motion_vectors(self) -> Signal | None:
        if not self._has_vectors:
            return None
        data: Any = self._frame.side_data.get("MOTION_VECTORS")
        return _NO_VECTORS if data is None else data.to_ndarray()

    @property
    def full_range(self) -> bool:
        """Whether `luma` is 0..255; else it is 16..235."""
        if self._readable is not self._frame:
            return False
        return self._frame.color_range == _FULL_RANGE or "yuvj" in self._frame.format.name

    def _plane(self, number: int) -> Picture:
        plane: Any = self._readable.planes[number]
        name = self._readable.format.name
        if name in _DEEP:
            rows: Any = np.frombuffer(plane, np.dtype("<u2")).reshape(-1, plane.line_size // 2)
        else:
            rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        if number and name in ("nv12", "nv21"):
            rows = rows[: plane.height, : 2 * plane.width].reshape(plane.height, plane.width, 2)
        picture: Picture = rows[: plane.height, : plane.width]
        return picture

    def _reduced(self, stored: Picture) -> Picture:
        plane: Any = stored
        height, width = self._size
        # OpenCV averages 2 x 2 pixels ten times faster than any other number.
        while plane.shape[0] >= 2 * height and plane.shape[1] >= 2 * width:
            half = plane.shape[0] // 2, plane.shape[1] // 2
            even = plane[: 2 * half[0], : 2 * half[1]]
            plane = cv2.resize(even, half[::-1], interpolation=cv2.INTER_AREA)
        if plane.shape[:2] != self._size:
            shrink = plane.shape[0] >= height and plane.shape[1] >= width
            how = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
            plane = cv2.resize(plane, (width, height), interpolation=how)
        if plane.dtype != np.uint8:
            plane = (plane >> _DEEP[self._readable.format.name]).astype(np.uint8)
        reduced: Picture = plane
        return reduced


_NO_VECTORS: Signal = np.empty(
    0,
    np.dtype(
        {
            "names": [
                "source", "w", "h", "src_x", "src_y", "dst_x", "dst_y", "flags",
                "motion_x", "motion_y", "motion_scale",
            ],
            "formats": [
                "<i4", "u1", "u1", "<i2", "<i2", "<i2", "<i2", "<u8", "<i4", "<i4", "<u2",
            ],
        },
        align=True,
    ),
)  # fmt: skip


@lru_cache
def _to_bgr(shares: tuple[float, float], full_range: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
    """`[3, 4]` that makes (B, G, R) of (Y, Cb, Cr, 1), by the definition of Y'CbCr (BT.601 2.5)."""
    red, blue = shares
    green = 1 - red - blue
    luma, chroma, black = (1.0, 1.0, 0.0) if full_range else (255 / 219, 255 / 224, 16.0)
    matrix = np.array(
        [
            [luma, 2 * (1 - blue) * chroma, 0],
            [
                luma,
                -2 * (1 - blue) * blue / green * chroma,
                -2 * (1 - red) * red / green * chroma,
            ],
            [luma, 0, 2 * (1 - red) * chroma],
        ]
    )
    offset = -matrix @ np.array([black, 128, 128])
    return np.column_stack([matrix, offset]).astype(np.float32)
