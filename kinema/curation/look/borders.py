"""Black bars: letterbox, pillarbox, or both.

A picture's side is cut into segments, and for each it is noted at which row (or column) from the
edge the picture stops being black: for the first time, and for the last time. A bar is where, over
the whole clip, most segments agree on one row: in a dark scene they do not. A segment with a
subtitle or a logo in the bar stops earlier, but is black once more and stops there for the last
time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np

from kinema.curation.look.analyzer import Picture, Signal

SEGMENTS = 16
PAIRS = SEGMENTS // 2
"""Where two segments are a whole number of pixels, sums of integers give the means that OpenCV's
`INTER_AREA` does, three to five times faster."""
BLACK = 14
"""Stored levels above black up to which the outermost rows may be a bar."""
STEP = 4.0
"""Levels above the bar from which a segment of a row belongs to the picture."""
QUANTILE = 0.1
"""Of the clip's samples: a segment is bar as far as it is black in the other nine tenths."""
EDGE = 0.35
"""Share of the level three rows further in that a picture's first row must have: scaling and coding
leave a row or two between bar and picture that belong to neither."""
AGREE = 0.6
"""Share of segments that must end at the same row, within `max(2, 0.4 %)` pixels."""
AGREE_FIRST = 0.25
"""Share of segments for which this must be the first end: no subtitle is that wide."""
DEEPEST = 0.4
"""Share of the side within which the last end is looked for."""
SMALLEST = 2
"""Pixels below which a bar is none."""
LEAST_PICTURE = 0.25
"""Share of a side that bars must leave, else the picture is taken for black, not for barred."""


class Borders(NamedTuple):
    """Pixels to crop."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def share(self, height: int, width: int) -> float:
        """Of the picture's area."""
        kept = (height - self.top - self.bottom) * (width - self.left - self.right)
        return 1 - kept / (height * width)


def black_depths(luma: Picture, full_range: bool) -> Signal:
    """`[2, 4, SEGMENTS]` int16: pixels from the top, bottom, left and right edge to where a segment
    stops being black: for the first time (the whole side where it never does), and for the last
    time within `DEEPEST` of the side.

    Segments of the top and bottom are parts of the width, from the left; those of the left and
    right parts of the height, from the top.
    """
    by_row, by_column = segment_means(luma)
    black = 0 if full_range else 16
    sides = by_row, by_row[::-1], by_column.T, by_column.T[::-1]
    return np.stack([_depths(side, black) for side in sides], 1).astype(np.int16)


def find_borders(depths: Signal, height: int, width: int) -> Borders:
    """The bars of a clip.

    Args:
        depths: `[M, 2, 4, SEGMENTS]` of its samples.
        height: of the picture as stored, pixels.
        width: the same.
    """
    if not len(depths):
        return Borders()
    rank = int(QUANTILE * len(depths))
    reach = np.partition(depths, rank, axis=0)[rank]
    across, down = (0, 0), (0, 0)
    for _ in range(2):  # what lies in the other pair's bars has no say
        inside = _inside(across, width)
        down = _pair(reach[:, 0, inside], reach[:, 1, inside], height)
        inside = _inside(down, height)
        across = _pair(reach[:, 2, inside], reach[:, 3, inside], width)
    return Borders(*down, *across)


def turned_borders(borders: Borders, rotation: int) -> Borders:
    """Bars of the stored picture for the displayed one, which is turned clockwise by 0, 90, 180 or
    270 degrees."""
    top, bottom, left, right = borders
    for _ in range(rotation // 90 % 4):
        top, bottom, left, right = left, right, bottom, top
    return Borders(top, bottom, left, right)


def segment_means(luma: Picture) -> tuple[Signal, Signal]:
    """`[H, SEGMENTS]` means of the parts of each row, and `[SEGMENTS, W]` of each column, rounded:
    what `cv2.resize` gives with `INTER_AREA`."""
    return _means_across(luma), _means_down(luma)


def _means_across(luma: Picture) -> Signal:
    height, width = luma.shape
    if width % PAIRS:
        found: Any = cv2.resize(luma, (SEGMENTS, height), interpolation=cv2.INTER_AREA)
        return _whole(found, 1)
    parts = np.ascontiguousarray(luma).reshape(-1, width // PAIRS)
    half, odd = divmod(width // PAIRS, 2)
    first, last = (_sums(side, 1) for side in (parts[:, :half], parts[:, half + odd :]))
    middle = parts[:, half : half + 1].astype(np.int32) * odd
    sums = np.concatenate([2 * first + middle, 2 * last + middle], 1)
    return _whole(sums.reshape(height, SEGMENTS), width // PAIRS)


def _means_down(luma: Picture) -> Signal:
    height, width = luma.shape
    if height % PAIRS:
        found: Any = cv2.resize(luma, (width, SEGMENTS), interpolation=cv2.INTER_AREA)
        return _whole(found, 1)
    half, odd = divmod(height // PAIRS, 2)
    sums: list[Signal] = []
    for part in luma.reshape(PAIRS, -1, width):
        middle = part[half].astype(np.int32) * odd
        sums += [2 * _sums(side, 0)[0] + middle for side in (part[:half], part[half + odd :])]
    return _whole(np.array(sums), height // PAIRS)


def _sums(picture: Picture, axis: int) -> Signal:
    if not picture.size:
        return np.zeros([1 if k == axis else n for k, n in enumerate(picture.shape)], np.int32)
    sums: Any = cv2.reduce(picture, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
    return np.asarray(sums)


def _whole(sums: Signal, count: int) -> Signal:
    return np.rint(sums.astype(np.float32) * np.float32(1 / count)).astype(np.uint8)


def _depths(means: Signal, black: int) -> Signal:
    """`[2, SEGMENTS]` of one side, from `[L, SEGMENTS]` means, the edge first."""
    bar = float(np.median(means[:2]))
    if bar > black + BLACK:
        return np.zeros((2, SEGMENTS))
    lit = means > bar + STEP
    first = np.where(lit.any(0), lit.argmax(0), len(means))
    for _ in range(2):
        # What is not lit at all stays at the end.
        here = means[np.minimum(first, len(means) - 1), np.arange(SEGMENTS)] - bar
        further = means[np.minimum(first + 3, len(means) - 1), np.arange(SEGMENTS)] - bar
        first = np.minimum(first + (here < EDGE * further), len(means))
    outer = ~lit[: max(1, int(DEEPEST * len(means)))][::-1]
    last = np.where(outer.any(0), len(outer) - outer.argmax(0), 0)
    return np.stack([first, last])


def _inside(bars: tuple[int, int], length: int) -> Signal:
    """Which segments lie between two bars."""
    edges = np.arange(SEGMENTS + 1) * length / SEGMENTS
    inside = (edges[:-1] >= bars[0]) & (edges[1:] <= length - bars[1])
    return inside if inside.any() else np.ones(SEGMENTS, np.bool_)


def _pair(near: Signal, far: Signal, length: int) -> tuple[int, int]:
    first, last = _bar(near, length), _bar(far, length)
    if length - first - last < LEAST_PICTURE * length:
        return 0, 0
    return first, last


def _bar(reach: Signal, length: int) -> int:
    """The depth that most segments agree on, 0 if they do not."""
    first, last = reach
    tolerance = max(2.0, 0.004 * length)
    agree = np.abs(first[:, None] - first[None, :]) <= tolerance
    best = int(agree.sum(1).argmax())
    depth = int(np.median(first[agree[best]]))
    again = (first < depth) & (np.abs(last - depth) <= tolerance)
    if agree[best].mean() < AGREE_FIRST or (agree[best] | again).mean() < AGREE:
        return 0
    return depth if SMALLEST <= depth < length else 0
