"""Perceptual hashes of sampled frames: the same picture after scaling and recoding has (nearly) the
same 64 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from kinema.curation.config import HashConfig
from kinema.curation.look.analyzer import FrameView, Picture, Signal
from kinema.curation.look.probe import SourceInfo
from kinema.curation.look.sampling import Samples

VERSION = 1
COLUMNS: dict[str, pa.DataType] = {"phash": pa.string()}
PICKS = 5
"""Hashes of a clip: of the frames nearest to the middles of as many equal parts."""

_SIDE, _KEPT = 32, 8
_COSINES = np.cos(np.pi * np.outer(np.arange(_KEPT), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))


class HashAnalyzer:
    """`frames` [M] and `hashes` [M] (uint64) of the pictures as displayed."""

    def __init__(self, config: HashConfig, info: SourceInfo) -> None:
        self._samples = Samples(config.per_s)
        self._turns = -info.rotation // 90
        self._found: list[tuple[int, int]] = []

    def frame(self, view: FrameView) -> None:
        if self._samples.due(view.time_s):
            self._found.append((view.index, phash(np.rot90(view.small, self._turns))))

    def signals(self) -> dict[str, Signal]:
        return {
            "frames": np.array([f[0] for f in self._found], np.int32),
            "hashes": np.array([f[1] for f in self._found], np.uint64),
        }


def phash(picture: Picture) -> int:
    """64 bits of a grey picture `[h, w]`, as `imagehash.phash` finds them.

    The picture at 32 x 32, its 8 x 8 lowest cosine coefficients (DCT-II) row by row, 1 where one is
    above their median; the first is the highest bit.
    """
    reduced = Image.fromarray(np.ascontiguousarray(picture)).resize(
        (_SIDE, _SIDE), Image.Resampling.LANCZOS
    )
    low = _COSINES @ np.asarray(reduced, np.float64) @ _COSINES.T
    bits = np.packbits((low > np.median(low)).ravel())
    return int.from_bytes(bits.tobytes(), "big")


def hash_columns(signals: Mapping[str, Signal], start: int, end: int) -> dict[str, Any]:
    """`phash`: five hashes of 16 hex digits with spaces between; None for a clip with no sample."""
    frames = signals["frames"]
    inside = np.flatnonzero((frames >= start) & (frames < end))
    if not len(inside):
        return {"phash": None}
    wanted = start + (end - start) * (np.arange(PICKS) + 0.5) / PICKS
    nearest = np.abs(frames[inside][:, None] - wanted).argmin(0)
    return {"phash": " ".join(f"{int(h):016x}" for h in signals["hashes"][inside][nearest])}
