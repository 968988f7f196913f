"""How much moves: the codec's motion vectors, optical flow on sampled frames, the camera.

Vectors cost almost nothing but exist for some codecs only, and follow the encoder's interest, not
the scene's. Flow is worked out on pairs of neighbouring frames, some per second; a third frame
after each pair shows how the camera's motion changes (shake).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from kinema.curation.config import MotionConfig
from kinema.curation.look.analyzer import FrameView, Picture, Signal
from kinema.curation.look.camera import fit_camera, name_motion, textured_points, weighed
from kinema.curation.look.probe import SourceInfo
from kinema.curation.look.sampling import Samples

VERSION = 1
COLUMNS: dict[str, pa.DataType] = {
    "motion_mv": pa.float64(),
    "motion_mv_patch": pa.float64(),
    "flow": pa.float64(),
    "static_share": pa.float64(),
    "camera_motion": pa.string(),
    "jitter": pa.float64(),
}

BLOCK = 16
"""Pixels of a macroblock, which vectors are counted by."""
PATCH = 256
"""Pixels of a patch (NeMo Curator's)."""
FLOW_WIDTH, FLOW_HEIGHT, FLOW_S = 576, 320, 1 / 3
"""Open-Sora 1.2 takes flow between frames ten apart (a third of a second at 30 frames/s) at 576 x
320, portrait pictures turned."""
FRAME_S = 1 / 30
"""What `jitter` calls a frame, so that 60 frames/s do not halve it."""
CELL = 4
"""Side of the squares of the reduced picture whose change tells whether anything moves."""
LEAST_SIDE = 16
"""Pixels of the reduced picture's shorter side that flow needs."""
MOVED_SHARE = 0.002
"""Share of the picture that must change for anything to have moved."""
MOVED_LEVELS = 6.0
"""Levels (of 255) by which it must change: above what noise and compression leave of a mean over
a cell (16 x 16 pixels at 720p)."""


class MotionAnalyzer:
    """Signals of motion.

    `vector_frames` [K]: predicted frames with vectors to the past only (P frames), and for each
    `vectors` (mean length per frame / (width + height)), `vector_distance` (frames since the last
    frame that others may refer to) and `vector_patches` [K, patches] (the same mean per patch).

    `frames` [M]: sampled frames, and for each `until` (last frame that was used), `flow` (see
    `motion_columns`), `camera` [M, 4] (rates, see `camera.py`), `shake` (change of the camera's
    displacement within 1/30 s, in longer sides) and `change` (levels by which 0.2 % of the
    picture differ from the sample before).

    `size` [2]: height and width as stored.
    """

    def __init__(self, config: MotionConfig, info: SourceInfo) -> None:
        self._size = info.stored_height, info.stored_width
        self._vectors = _Vectors(*self._size)
        self._samples = Samples(config.flow_per_s)
        # Neighbours are a thirtieth of a second apart, or one frame where frames are rarer.
        self._step = max(1, round(info.fps * FRAME_S))
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        # At half of the reduced size, with patches further apart: twice as exact as at the quarter
        # that the preset has (0.02 pixels), for 0.4 ms more.
        self._flow.setFinestScale(1)
        self._flow.setPatchStride(6)
        self._open: list[tuple[int, float, Picture]] = []
        self._cells: Picture | None = None
        self._found: dict[str, list[Any]] = {
            name: [] for name in ("frames", "until", "flow", "camera", "shake", "change")
        }

    def frame(self, view: FrameView) -> None:
        vectors = view.motion_vectors
        if vectors is not None:
            self._vectors.frame(view.index, vectors)
        due = self._samples.due(view.time_s)
        if self._open:
            if view.index == self._open[-1][0] + self._step:
                self._open.append((view.index, view.time_s, view.small.copy()))
            if len(self._open) == 3:
                self._measure()
        if due and not self._open:
            small = view.small.copy()
            self._open = [(view.index, view.time_s, small)]
            self._found["frames"].append(view.index)
            self._found["change"].append(self._change(small))

    def signals(self) -> dict[str, Signal]:
        if self._open:
            self._measure()
        found = self._found
        return {
            "size": np.array(self._size, np.int32),
            "frames": np.array(found["frames"], np.int32),
            "until": np.array(found["until"], np.int32),
            "flow": np.array(found["flow"], np.float32),
            "camera": np.array(found["camera"], np.float32).reshape(-1, 4),
            "shake": np.array(found["shake"], np.float32),
            "change": np.array(found["change"], np.float32),
            **self._vectors.signals(),
        }

    def _measure(self) -> None:
        """What the two or three open frames tell."""
        pictures, self._open = self._open, []
        flow, camera, shake = np.nan, np.full(4, np.nan), np.nan
        passed = [b[1] - a[1] for a, b in pairwise(pictures)]
        if passed and min(passed) > 0 and min(pictures[0][2].shape) >= LEAST_SIDE:
            points = textured_points(pictures[0][2])
            moved = self._between(pictures[0][2], pictures[1][2])
            flow = flow_score(moved) / passed[0]
            first = fit_camera(moved, points)
            if first:
                camera = first.moved / passed[0]
            if first and len(passed) > 1:
                moved = self._between(pictures[1][2], pictures[2][2])
                second = fit_camera(moved, points)
                if second:
                    # As if all frames were 1/30 s apart: displacement per frame, and its change
                    # per frame.
                    change = second.moved / passed[1] - first.moved / passed[0]
                    change *= FRAME_S * FRAME_S / (sum(passed) / 2)
                    shake = float(np.linalg.norm(weighed(change, *self._size)))
                    camera = (first.moved + second.moved) / sum(passed)
        self._found["until"].append(pictures[-1][0])
        self._found["flow"].append(flow)
        self._found["camera"].append(camera)
        self._found["shake"].append(shake)

    def _between(self, first: Picture, second: Picture) -> Any:
        """`[h, w, 2]` pixels."""
        nothing: Any = None  # no flow to begin with
        return self._flow.calc(first, second, nothing)

    def _change(self, small: Picture) -> float:
        height, width = small.shape
        size = max(1, width // CELL), max(1, height // CELL)
        cells: Any = cv2.resize(small, size, interpolation=cv2.INTER_AREA).astype(np.int16)
        before, self._cells = self._cells, cells
        if before is None or before.shape != cells.shape:
            return np.nan
        change = cells - before
        # Light that changes everywhere is no motion.
        change = np.abs(change - np.median(change)).ravel()
        rank = len(change) - 1 - int(MOVED_SHARE * len(change))
        return float(np.partition(change, rank)[rank])


class _Vectors:
    """Motion vectors of predicted frames.

    Frames that are predicted from the past alone are enough: their vectors span the frames since
    the one they refer to. Vectors of frames between (B) point to frames that are not named, so that
    their length means nothing by itself.
    """

    def __init__(self, height: int, width: int) -> None:
        self._size = height, width
        self._blocks = -(-height // BLOCK), -(-width // BLOCK)
        self._anchor: int | None = None
        self._found: list[tuple[int, int, float, Signal]] = []

    def frame(self, index: int, vectors: Signal) -> None:
        if not len(vectors):
            self._anchor = index  # a key frame: nothing is known of the way to it
            return
        if (vectors["source"] > 0).any():
            return
        if self._anchor is not None and index > self._anchor:
            per_frame = self._lengths(vectors) / (index - self._anchor)
            height, width = self._size
            mean = float(per_frame.sum() / (height * width))
            self._found.append((index, index - self._anchor, mean, self._patches(per_frame)))
        self._anchor = index

    def signals(self) -> dict[str, Signal]:
        rows = [-(-n * BLOCK // PATCH) for n in self._blocks]
        patches = np.array([f[3] for f in self._found], np.float32)
        return {
            "vector_frames": np.array([f[0] for f in self._found], np.int32),
            "vector_distance": np.array([f[1] for f in self._found], np.int32),
            "vectors": np.array([f[2] for f in self._found], np.float32),
            "vector_patches": patches.reshape(-1, rows[0] * rows[1]),
        }

    def _lengths(self, vectors: Signal) -> Signal:
        """`[rows, columns]` per macroblock: length × area, length as a share of width + height.

        Blocks without a vector (coded without prediction) count as 0, as in NeMo Curator.
        """
        rows, columns = self._blocks
        x, y = vectors["motion_x"].astype(np.float32), vectors["motion_y"].astype(np.float32)
        area = vectors["w"].astype(np.float32) * vectors["h"]
        scale = np.maximum(vectors["motion_scale"], 1).astype(np.float32) * sum(self._size)
        weights = np.hypot(x, y) / scale * area
        column = np.clip(vectors["dst_x"].astype(np.int32) // BLOCK, 0, columns - 1)
        row = np.clip(vectors["dst_y"].astype(np.int32) // BLOCK, 0, rows - 1)
        place = row * columns + column
        total: Any = np.bincount(place, weights, rows * columns)
        covered = np.bincount(place, area, rows * columns)
        # A block that is predicted twice counts once.
        total = total * (BLOCK * BLOCK / np.maximum(covered, BLOCK * BLOCK))
        lengths: Signal = total.reshape(rows, columns)
        return lengths

    def _patches(self, lengths: Signal) -> Signal:
        """The mean of each patch; those at the right and lower edge may be smaller."""
        height, width = self._size
        step = PATCH // BLOCK
        down, across = np.arange(0, lengths.shape[0], step), np.arange(0, lengths.shape[1], step)
        sums = np.add.reduceat(np.add.reduceat(lengths, down, 0), across, 1)
        high = np.minimum(PATCH, height - down * BLOCK)
        wide = np.minimum(PATCH, width - across * BLOCK)
        patches: Signal = (sums / np.outer(high, wide)).ravel()
        return patches


def flow_score(flow: Signal) -> float:
    """Mean of |x| and |y| over the picture in pixels of 576 x 320, for a third of a second.

    Args:
        flow: `[h, w, 2]` pixels per second (or per anything, for the same per that).
    """
    height, width = flow.shape[:2]
    across, down = (FLOW_WIDTH, FLOW_HEIGHT) if width >= height else (FLOW_HEIGHT, FLOW_WIDTH)
    x, y = np.abs(flow[..., 0]).mean(), np.abs(flow[..., 1]).mean()
    return float(FLOW_S * (x * across / width + y * down / height) / 2)


def motion_columns(signals: Mapping[str, Signal], start: int, end: int) -> dict[str, Any]:
    """Columns of the clip of frames `start` to `end` (exclusive); None where nothing is known.

    - `motion_mv`: mean length of the codec's vectors per frame, as a share of width + height;
    - `motion_mv_patch`: the same of the 256-pixel patch with the smallest;
    - `flow`: mean of |x| and |y| of optical flow, in pixels of a 576 x 320 picture in 1/3 s;
    - `static_share`: of the intervals between samples, those in which nothing moves;
    - `camera_motion`: see `camera.name_motion`, of the picture as stored;
    - `jitter`: median change of the camera's displacement from one 1/30 s to the next, as a share
      of the longer side.
    """
    columns: dict[str, Any] = dict.fromkeys(COLUMNS)
    distance, place = signals["vector_distance"], signals["vector_frames"]
    inside = (place - distance >= start) & (place < end)
    if inside.any():
        weights = distance[inside] / distance[inside].sum()
        columns["motion_mv"] = float(weights @ signals["vectors"][inside])
        columns["motion_mv_patch"] = float((weights @ signals["vector_patches"][inside]).min())

    frames = signals["frames"]
    inside = (frames >= start) & (signals["until"] < end)
    columns["flow"] = _mean(signals["flow"][inside])
    columns["jitter"] = _typical(signals["shake"][inside])
    height, width = signals["size"]
    columns["camera_motion"] = name_motion(
        signals["camera"][inside], signals["shake"][inside], float(height), float(width)
    )
    before = np.concatenate([[-1], frames[:-1]])
    change = signals["change"][(before >= start) & (frames < end)]
    change = change[np.isfinite(change)]
    if len(change):
        columns["static_share"] = float((change < MOVED_LEVELS).mean())
    return columns


def _mean(values: Signal) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _typical(values: Signal) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None
