"""Which size and length a clip trains at: the bucket rule of Open-Sora 1.2, for whole tables.

Resolutions are tried from the largest area down. One is passed over when the clip has less than
0.8 of its area. Among its lengths, from the longest down, the first that the clip exceeds
(*strictly*: a clip of 51 frames misses a bucket of 51) is chosen; a bucket with a pair of
probabilities may first be passed over by its second one. The clip is then kept with the bucket's
probability; if not, the next lower resolution is tried. Images look at buckets of 1 frame only.
Last, the published aspect ratio nearest to the clip's decides the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kinema.data import draws
from kinema.data.aspect import Resolution, resolution
from kinema.data.config import BucketSettings, DataConfig

AREA_TOLERANCE = 0.8
"""A clip may train at a resolution of which it has at least this fraction of the area."""

TOO_SMALL, TOO_SHORT, PROBABILITY_ZERO, NOT_DRAWN, NOT_CACHED = -1, -2, -3, -4, -5
"""Why `BucketTable.assign` gives a clip no bucket."""

REASONS = {
    TOO_SMALL: "too small",
    TOO_SHORT: "too short",
    PROBABILITY_ZERO: "probability 0",
    NOT_DRAWN: "keep probability",
    NOT_CACHED: "no latents in the cache",
}

_CHUNK = 1 << 17
"""Rows handled at once: the working arrays stay in the processor's cache."""


@dataclass(frozen=True)
class Bucket:
    """One shape of micro-batch: all its clips have this size and number of frames."""

    index: int
    """Position in `BucketTable.buckets`."""
    resolution: str
    frames: int
    ratio: float
    """Published aspect key, height over width."""
    height: int
    width: int
    max_batch: int
    """The most clips that one micro-batch may hold."""

    def __str__(self) -> str:
        frames = "image" if self.frames == 1 else f"{self.frames} frames"
        return f"{self.resolution} {frames} {self.width}x{self.height}"


@dataclass(frozen=True)
class Length:
    """One (resolution, number of frames) of the rule, before the aspect ratio is known."""

    ordinal: int
    """Its place in the order in which the rule tries them: names its random draws."""
    frames: int
    keep: float
    """Probability that a clip which came here stays."""
    attempt: float | None
    """Probability that a clip tries this length at all; None: always, and without a draw."""
    first_bucket: int | None
    """Index of the first of its buckets, one per aspect ratio; None where nothing is kept."""


class Draw(Protocol):
    """Uniform numbers in [0, 1) for the rule."""

    def __call__(self, rows: NDArray[np.int64], ordinal: int, nth: int) -> NDArray[np.float64]:
        """The `nth` (0, 1) number of each row at the length with this ordinal."""
        ...


class Cached(Protocol):
    """Latents that were worked out before; clips train at sizes and lengths that there are."""

    def frames_at(self, height: int, width: int) -> NDArray[np.int32]:
        """[N] frames of every row of the manifest at a size in pixels; 0: none."""
        ...

    def fits(self, cached: NDArray[np.int32], frames: int) -> NDArray[np.bool_]:
        """Whether so many frames can be had of clips with so many cached."""
        ...


def keyed_draw(seed: int, epoch: int) -> Draw:
    """Draws that depend on (seed, epoch, row, ordinal) only."""
    base = draws.key(seed, "bucket", epoch)

    def draw(rows: NDArray[np.int64], ordinal: int, nth: int) -> NDArray[np.float64]:
        return draws.uniform(draws.bits(base, rows), 2 * ordinal + nth)

    return draw


class BucketTable:
    """The buckets of a recipe, and the rule that assigns clips to them.

    Args:
        buckets: resolution -> frames -> (probability, batch size), as in `DataConfig`.
        frame_interval: every how many-th frame of a clip is used.
    """

    def __init__(
        self, buckets: Mapping[str, Mapping[int, BucketSettings]], frame_interval: int = 1
    ) -> None:
        self.frame_interval = frame_interval
        self.buckets: list[Bucket] = []
        self.levels: list[tuple[Resolution, list[Length]]] = []
        """The rule's order: from the largest resolution, each from its longest clips down."""
        ordinal = 0
        for found in sorted((resolution(name) for name in buckets), key=lambda r: -r.pixels):
            lengths = []
            for frames in sorted(buckets[found.name], reverse=True):
                probability, batch_size = buckets[found.name][frames]
                keep, attempt = (
                    probability if isinstance(probability, tuple) else (probability, None)
                )
                first = self._add(found, frames, batch_size) if batch_size and keep > 0 else None
                lengths.append(Length(ordinal, frames, keep, attempt, first))
                ordinal += 1
            self.levels.append((found, lengths))
        self.settings: dict[str, Any] = {"frame_interval": frame_interval}
        """What decides where clips go, in words and JSON values, in the rule's order."""
        for found, lengths in self.levels:
            for length in lengths:
                probability, batch_size = buckets[found.name][length.frames]
                pair = list(probability) if isinstance(probability, tuple) else probability
                self.settings[f"{found.name} {length.frames} frames"] = [pair, batch_size]

    @classmethod
    def from_config(cls, config: DataConfig) -> BucketTable:
        return cls(config.buckets, config.frame_interval)

    def _add(self, found: Resolution, frames: int, batch_size: int) -> int:
        first = len(self.buckets)
        for i, ((height, width), ratio) in enumerate(zip(found.sizes, found.ratios, strict=True)):
            self.buckets.append(
                Bucket(first + i, found.name, frames, ratio, height, width, batch_size)
            )
        return first

    def assign(
        self,
        num_frames: NDArray[np.integer],
        height: NDArray[np.integer],
        width: NDArray[np.integer],
        draw: Draw,
        rows: NDArray[np.int64] | None = None,
        cached: Cached | None = None,
    ) -> NDArray[np.int32]:
        """The bucket of every clip, or why it has none.

        Args:
            num_frames: [N] frames of the clip; 1 is an image.
            height, width: [N] pixels.
            draw: the random numbers, by row; see `keyed_draw`.
            rows: [N] what to call the clips when drawing; 0..N-1 by default.
            cached: only where there are latents, for as many frames as there are.

        Returns:
            [N] index into `buckets`, or one of `REASONS` (negative).
        """
        rows = np.arange(len(num_frames)) if rows is None else rows
        result = np.empty(len(num_frames), dtype=np.int32)
        at_sizes = [
            [cached.frames_at(*size) for size in found.sizes] if cached else []
            for found, _ in self.levels
        ]
        for start in range(0, len(result), _CHUNK):
            part = slice(start, start + _CHUNK)
            frames, tall, wide = (v[part].astype(np.int64) for v in (num_frames, height, width))
            clips: _Clips = _Files(frames, self.frame_interval)
            if cached:
                here = [
                    np.stack([of_size[part] for of_size in of_level])[
                        found.closest(tall, wide), np.arange(len(frames))
                    ]
                    for (found, _), of_level in zip(self.levels, at_sizes, strict=True)
                ]
                clips = _Latents(here, cached)
            result[part] = self._assign(clips, tall, wide, draw, rows[part])
        return result

    def _assign(
        self,
        clips: _Clips,
        height: NDArray[np.int64],
        width: NDArray[np.int64],
        draw: Draw,
        rows: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        result = np.full(len(rows), TOO_SMALL, dtype=np.int32)
        area = height * width
        open_ = np.arange(len(rows))  # clips without a bucket so far
        for level, (found, lengths) in enumerate(self.levels):
            seeking = open_[area[open_] >= found.pixels * AREA_TOLERANCE]
            there = clips.there(level, seeking)
            result[seeking] = np.minimum(result[seeking], np.where(there, TOO_SHORT, NOT_CACHED))
            seeking = seeking[there]
            kept: list[NDArray[np.int64]] = []
            for length in lengths:
                fits = clips.fit(level, seeking, length.frames)
                if not fits.any():
                    continue
                here = seeking[fits]
                reason = PROBABILITY_ZERO if length.keep == 0 else NOT_DRAWN
                result[here] = np.minimum(result[here], reason)
                if length.attempt is not None:
                    tries = draw(rows[here], length.ordinal, 0) <= length.attempt
                    fits[fits] = tries
                    here = here[tries]
                seeking = seeking[~fits]
                if length.keep < 1:
                    second = length.attempt is not None
                    here = here[draw(rows[here], length.ordinal, int(second)) < length.keep]
                if len(here):
                    assert length.first_bucket is not None
                    aspect = found.closest(height[here], width[here])
                    result[here] = length.first_bucket + aspect
                    kept.append(here)
            if kept:
                open_ = open_[result[open_] < 0]
        return result


class _Clips(Protocol):
    """What lengths a chunk of the table's clips can have."""

    def there(self, level: int, clips: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether clips can be had at a resolution."""
        ...

    def fit(self, level: int, clips: NDArray[np.int64], frames: int) -> NDArray[np.bool_]:
        """Whether they can be had with so many frames."""
        ...


@dataclass(frozen=True)
class _Files:
    num_frames: NDArray[np.int64]
    frame_interval: int

    def there(self, level: int, clips: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.ones(len(clips), dtype=np.bool_)

    def fit(self, level: int, clips: NDArray[np.int64], frames: int) -> NDArray[np.bool_]:
        num_frames = self.num_frames[clips]
        if frames == 1:
            return num_frames == 1
        return (num_frames > 1) & (num_frames > frames * self.frame_interval)


@dataclass(frozen=True)
class _Latents:
    frames: list[NDArray[np.int32]]
    """Of every resolution: frames cached of each clip at the size it would have there."""
    cached: Cached

    def there(self, level: int, clips: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self.frames[level][clips] > 0

    def fit(self, level: int, clips: NDArray[np.int64], frames: int) -> NDArray[np.bool_]:
        return self.cached.fits(self.frames[level][clips], frames)
