"""Where one clip goes under the bucket rule, with which probability, and why: in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from kinema.data.aspect import Resolution
from kinema.data.buckets import AREA_TOLERANCE, Bucket, BucketTable, Length
from kinema.data.expression import ExpressionError
from kinema.data.filter import PREFIX, Rule

SHOWN = 120
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Explanation:
    """The rule applied to one clip."""

    chances: list[tuple[Bucket, float]]
    """Buckets with the probability that an epoch finds the clip there, in the rule's order."""
    left_out: float
    """Probability that an epoch leaves the clip out."""
    lines: list[str]
    """The way through the rule."""


def explain(table: BucketTable, num_frames: int, height: int, width: int) -> Explanation:
    """Walk one clip (frames, pixels) through every step of the rule."""
    kind = "image" if num_frames == 1 else f"video of {num_frames} frames"
    walk = _Walk(table, num_frames, height, width)
    walk.lines.append(f"{kind}, {width}x{height} = {height * width:,} pixels")
    for found, lengths in table.levels:
        walk.resolution(found, lengths)
        if walk.open <= 0:
            break
    if not walk.chances:
        walk.lines.append("nowhere: " + walk.why_nowhere())
    return Explanation(walk.chances, max(walk.open, 0.0), walk.lines)


def why_dropped(clip: pa.Table) -> list[str]:
    """Why a clip is not trained on, with the values that the rule looked at; empty: it is.

    Args:
        clip: one row of a manifest.
    """
    reason = str(clip.column("dropped_by")[0].as_py() or "")
    lines = [f"dropped_by = {reason}"] if reason else []
    columns = []
    if reason.startswith(PREFIX):
        try:
            rule = Rule.parse(reason.removeprefix(PREFIX))
            rule.expression.check(clip.schema)
        except ExpressionError:
            lines.append("  the rule does not fit the columns that are there now")
        else:
            looked_at = rule.expression.looked_at(clip, 0)
            columns += [name for name, _ in looked_at]
            lines += [f"  {name} = {value_text(value)}" for name, value in looked_at]
            if rule.expression.mask(clip)[0]:
                lines.append("  the rule holds with these values: filter again to bring it back")
    if reason:  # what a rule on these columns means is in the columns beside them
        for name, beside in BESIDE.items():
            if name in columns:
                lines += [
                    f"  {other} = {value_text(clip.column(other)[0].as_py())}"
                    for other in beside
                    if other in clip.column_names and other not in columns
                ]
    return lines


BESIDE = {
    "duplicate_of": ("hash_distance",),
    "similar_to": ("similarity",),
    "concept_rank": ("concept", "aesthetic"),
    "ocr_area": ("ocr_text",),
    "ocr_boxes": ("ocr_text",),
    "border_share": ("border_top", "border_bottom", "border_left", "border_right"),
}
"""Column of a rule -> columns that say more about it."""


def value_text(value: Any) -> str:
    """A value as an expression would write it."""
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0f}"
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= SHOWN else f'"{value[: SHOWN - 3]}..."'
    return str(value)


class _Walk:
    """How much probability is still open, and what was said on the way."""

    def __init__(self, table: BucketTable, num_frames: int, height: int, width: int) -> None:
        self.table = table
        self.num_frames, self.height, self.width = num_frames, height, width
        self.open = 1.0
        self.chances: list[tuple[Bucket, float]] = []
        self.lines: list[str] = []
        self.was_large_enough = False
        self.was_long_enough = False

    def resolution(self, found: Resolution, lengths: list[Length]) -> None:
        floor, area = found.pixels * AREA_TOLERANCE, self.height * self.width
        if area < floor:
            self.say(found, f"too small: needs {floor:,.0f} pixels ({AREA_TOLERANCE} of its area)")
            return
        self.was_large_enough = True
        seeking, arriving = self.open, self.open
        for length in lengths:
            if not self.fits(length):
                continue
            self.was_long_enough = True
            tries = seeking * (1.0 if length.attempt is None else length.attempt)
            self.keep(found, length, tries)
            seeking -= tries
            if seeking <= 0:
                break
        if seeking == arriving:
            self.say(found, f"no length fits: {self.needs(lengths)}")
        if 0 < self.open < arriving:
            self.say(found, f"with probability {self.open:.3g}, on to a lower resolution")

    def fits(self, length: Length) -> bool:
        if length.frames == 1 or self.num_frames == 1:
            return length.frames == self.num_frames
        return self.num_frames > length.frames * self.table.frame_interval

    def needs(self, lengths: list[Length]) -> str:
        if self.num_frames == 1:
            return "it takes no images"
        shortest = min((n.frames for n in lengths if n.frames > 1), default=None)
        if shortest is None:
            return "it takes images only"
        return f"a video needs more than {shortest * self.table.frame_interval} frames"

    def keep(self, found: Resolution, length: Length, tries: float) -> None:
        name = "images" if length.frames == 1 else f"{length.frames} frames"
        tried = "" if length.attempt is None else f"tried with {length.attempt:g}, "
        if length.first_bucket is None or tries <= 0:
            self.say(found, f"{name}: {tried}kept with 0: nothing stays here")
            return
        aspect = int(found.closest(np.array([self.height]), np.array([self.width]))[0])
        bucket = self.table.buckets[length.first_bucket + aspect]
        chance = tries * length.keep
        self.chances.append((bucket, chance))
        self.open -= chance
        if self.open < 1e-12:
            self.open = 0.0
        self.say(
            found,
            f"{name}: {tried}kept with {length.keep:g} -> {bucket.width}x{bucket.height} "
            f"(height/width {self.height / self.width:.3f}, nearest key {bucket.ratio:g}), "
            f"at most {bucket.max_batch} per micro-batch: probability {chance:.3g}",
        )

    def why_nowhere(self) -> str:
        if not self.was_large_enough:
            return "it is too small for every resolution of the recipe"
        if not self.was_long_enough:
            return "no resolution that it is large enough for takes its length"
        return "every bucket that it fits has probability 0"

    def say(self, found: Resolution, text: str) -> None:
        self.lines.append(f"{found.name}: {text}")
