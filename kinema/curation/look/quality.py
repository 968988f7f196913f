"""Sharpness, brightness, borders, repeated frames and blockiness.

Repeated frames are counted on all frames, the rest on some per second. Sharpness and brightness are
kept for the tiles of a grid, so that the columns of a clip describe its picture without bars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from kinema.curation.config import QualityConfig
from kinema.curation.look.analyzer import FrameView, Picture, Signal
from kinema.curation.look.borders import Borders, black_depths, find_borders
from kinema.curation.look.probe import SourceInfo
from kinema.curation.look.sampling import Samples

VERSION = 1
COLUMNS: dict[str, pa.DataType] = {
    "sharpness": pa.float64(),
    "brightness": pa.float64(),
    "dark_share": pa.float64(),
    "bright_share": pa.float64(),
    "duplicate_share": pa.float64(),
    "blockiness": pa.float64(),
    "border_top": pa.int32(),
    "border_bottom": pa.int32(),
    "border_left": pa.int32(),
    "border_right": pa.int32(),
    "border_share": pa.float64(),
}

SHARP_SIDE = 640
"""Pixels of the longer side at which sharpness is measured: a large picture that holds no more
detail than a small one counts as equally sharp."""
TILES = 9, 16
DARK, BRIGHT = 16, 239
"""Levels (of 255) below and above which a pixel is dark or bright."""
SAME_MEAN, SAME_MOST = 0.3, 6.0
"""Mean and largest difference (levels, of the reduced pictures) of a frame that repeats the one
before it, whatever goes on around them."""
PAUSE, PAUSE_MEAN = 0.12, 1.5
"""Where frames around it differ much more, a frame is a repeated one too if its mean difference is
less than this share of theirs, and this many levels: coarse coding of one picture twice."""
_NONE, _DARK, _BRIGHT, _FULL = (np.array([n]) for n in (0, DARK - 1, BRIGHT + 1, 255))
GRID = 8
"""Pixels of a coded block's side."""


class QualityAnalyzer:
    """Signals of quality.

    `difference` [N, 2]: mean and largest difference of the reduced picture from that of the frame
    before (levels; NaN for the first). `frames` [M]: sampled frames,
    and for each `sharpness` [M, 9, 16] (mean squared Laplacian of a tile), `brightness`, `dark` and
    `bright` [M, 9, 16] uint8 (mean level; share of pixels × 255), `blockiness` [M] and
    `black_depths` [M, 2, 4, 16] (see `borders.py`). `size` [2]: height and width as stored.
    """

    def __init__(self, config: QualityConfig, info: SourceInfo) -> None:
        self._size = info.stored_height, info.stored_width
        self._samples = Samples(config.per_s)
        self._before: Picture | None = None
        self._differences: list[tuple[float, float]] = []
        self._found: dict[str, list[Any]] = {
            name: []
            for name in (
                "frames",
                "sharpness",
                "brightness",
                "dark",
                "bright",
                "blockiness",
                "black_depths",
            )
        }

    def frame(self, view: FrameView) -> None:
        small = view.small
        self._differences.append(_difference(small, self._before))
        self._before = small.copy()
        if not self._samples.due(view.time_s) or view.luma.shape != self._size:
            return
        luma = view.luma
        for name, value in (
            ("frames", view.index),
            ("sharpness", sharpness_tiles(luma, view.full_range)),
            ("brightness", _tiles(small)),
            ("dark", _tiles(cv2.inRange(small, _NONE, _DARK))),
            ("bright", _tiles(cv2.inRange(small, _BRIGHT, _FULL))),
            ("blockiness", blockiness(luma)),
            ("black_depths", black_depths(luma, view.full_range)),
        ):
            self._found[name].append(value)

    def signals(self) -> dict[str, Signal]:
        types = {"frames": np.int32, "black_depths": np.int16}
        types |= dict.fromkeys(("brightness", "dark", "bright"), np.uint8)
        found = {n: np.array(v, types.get(n, np.float32)) for n, v in self._found.items()}
        return {
            "size": np.array(self._size, np.int32),
            "difference": np.array(self._differences, np.float32).reshape(-1, 2),
            **found,
        }


def _difference(picture: Picture, before: Picture | None) -> tuple[float, float]:
    if before is None:
        return np.nan, np.nan
    most = cv2.norm(picture, before, cv2.NORM_INF)
    return cv2.norm(picture, before, cv2.NORM_L1) / picture.size if most else 0.0, most


def count_repeats(difference: Signal) -> int:
    """How many frames of a clip show what the one before does.

    Args:
        difference: `[K, 2]` mean and largest difference of the clip's frames but the first.
    """
    if not len(difference):
        return 0
    mean, most = difference[:, 0], difference[:, 1]
    same = (mean <= SAME_MEAN) & (most <= SAME_MOST)
    # What frames around it differ by: the second largest of the two before and the two after, so
    # that drawings shown for three frames are found, and one flash misleads nobody.
    padded = np.pad(mean, 2)
    around = np.sort([padded[k : k + len(mean)] for k in (0, 1, 3, 4)], axis=0)[-2]
    same |= (mean < PAUSE * around) & (mean < PAUSE_MEAN)
    return int(same.sum())


def sharpness_tiles(luma: Picture, full_range: bool) -> Signal:
    """`[9, 16]` mean squared Laplacian (3 x 3, levels of full range) at a longer side of 640."""
    height, width = luma.shape
    scale = SHARP_SIDE / max(height, width)
    size = max(3, round(width * scale)), max(3, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture = luma if scale == 1 else cv2.resize(luma, size, interpolation=how)
    edges: Any = cv2.Laplacian(picture, cv2.CV_16S)
    tiles = _tiles(cv2.multiply(edges, edges, dtype=cv2.CV_32F))
    return tiles if full_range else tiles * (255 / 219) ** 2


def blockiness(luma: Picture) -> float:
    """How much larger steps are at one place in eight than elsewhere; 0 for none.

    Mean absolute differences of neighbouring columns (rows), the median of those that have the same
    place modulo 8: largest of the eight / their median - 1, the mean of both directions. The grid
    may lie anywhere, as cropping moves it; scaling destroys it. Every fourth line is looked at.
    """
    if min(luma.shape) <= GRID:
        return 0.0
    rows, columns = luma[::4], np.ascontiguousarray(luma[:, ::4])
    across: Any = cv2.reduce(cv2.absdiff(rows[:, 1:], rows[:, :-1]), 0, cv2.REDUCE_SUM, dtype=4)
    down: Any = cv2.reduce(cv2.absdiff(columns[1:], columns[:-1]), 1, cv2.REDUCE_SUM, dtype=4)
    return (_excess(across.ravel(), len(rows)) + _excess(down.ravel(), columns.shape[1])) / 2


def _excess(steps: Signal, lines: int) -> float:
    whole = len(steps) // GRID * GRID
    if not whole:
        return 0.0
    # The median over the picture: the edge of a bar or a frame is one step, not a grid.
    by_place = np.median(steps[:whole].reshape(-1, GRID), axis=0) / lines
    # A flat picture's few steps say nothing: a twentieth of a level does not count.
    return float(by_place.max() - np.median(by_place)) / (float(np.median(by_place)) + 0.05)


def _tiles(picture: Any) -> Any:
    return cv2.resize(picture, TILES[::-1], interpolation=cv2.INTER_AREA)


def quality_columns(signals: Mapping[str, Signal], start: int, end: int) -> dict[str, Any]:
    """Columns of the clip of frames `start` to `end` (exclusive); None where nothing is known.

    - `sharpness`: variance of the Laplacian at 640 pixels, median over samples;
    - `brightness`: mean level, 0 (black) to 255;
    - `dark_share`, `bright_share`: of the pixels, those below 16 or above 239;
    - `duplicate_share`: of the frames, those that repeat the one before;
    - `blockiness`: see `blockiness`, median over samples;
    - `border_top`, `border_bottom`, `border_left`, `border_right`: pixels of the stored picture
      that are black bar throughout the clip;
    - `border_share`: of the area, that of the bars.

    Sharpness and brightness are of the picture without its bars.
    """
    columns: dict[str, Any] = dict.fromkeys(COLUMNS)
    if end > start:
        repeats = count_repeats(signals["difference"][start + 1 : end])
        columns["duplicate_share"] = repeats / (end - start)
    frames = signals["frames"]
    inside = (frames >= start) & (frames < end)
    if not inside.any():
        return columns
    height, width = (int(n) for n in signals["size"])
    borders = find_borders(signals["black_depths"][inside], height, width)
    tiles = _picture_tiles(borders, height, width)
    columns["sharpness"] = float(np.median(signals["sharpness"][inside][:, tiles].mean(1)))
    columns["brightness"] = float(signals["brightness"][inside][:, tiles].mean())
    columns["dark_share"] = float(signals["dark"][inside][:, tiles].mean() / 255)
    columns["bright_share"] = float(signals["bright"][inside][:, tiles].mean() / 255)
    columns["blockiness"] = float(np.median(signals["blockiness"][inside]))
    for side, pixels in borders._asdict().items():
        columns[f"border_{side}"] = pixels
    columns["border_share"] = borders.share(height, width)
    return columns


def _picture_tiles(borders: Borders, height: int, width: int) -> Signal:
    """`[9, 16]` bool: tiles that lie in the picture whole, with a pixel to spare for the edge."""
    inside: list[Signal] = []
    for count, length, first, last in (
        (TILES[0], height, borders.top, borders.bottom),
        (TILES[1], width, borders.left, borders.right),
    ):
        edges = np.arange(count + 1) * length / count
        spare = 2 * max(height, width) / SHARP_SIDE
        lower = first + spare if first else 0.0
        upper = length - last - spare if last else float(length)
        whole = (edges[:-1] >= lower) & (edges[1:] <= upper)
        middle = (edges[:-1] + edges[1:]) / 2
        inside.append(whole if whole.any() else (middle > first) & (middle < length - last))
    tiles: Signal = np.logical_and.outer(*inside)
    return tiles if tiles.any() else np.ones_like(tiles)
