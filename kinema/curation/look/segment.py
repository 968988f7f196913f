"""From signals to clips: which frames, and what their columns are. Decodes nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa

from kinema.curation.config import (
    CurateRecipe,
    HashConfig,
    MotionConfig,
    QualityConfig,
    ScenesConfig,
)
from kinema.curation.look.packages import opencv, scenedetect
from kinema.curation.stage import Bad, Part, Places, Result, Row, Work, row_id
from kinema.media.stores import read_bytes

if TYPE_CHECKING:
    from kinema.curation.look.analyzer import Signal

VERSION = 3
Clip = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """A clip's place in its source."""

    start: int
    end: int
    """The frame after the last."""
    text: str | None = None
    """A caption that came with a list of cuts."""
    columns: Mapping[str, Any] | None = None
    """Scores and labels that came with it."""


@dataclass(frozen=True)
class SegmentStage:
    """The clips of a source, as JSON in the column `_clips`. Without `scenes` (and without a list
    of cuts) a file is one clip."""

    scenes: ScenesConfig | None = field(default_factory=ScenesConfig)
    motion: MotionConfig | None = field(default_factory=MotionConfig)
    quality: QualityConfig | None = field(default_factory=QualityConfig)
    hashes: HashConfig | None = field(default_factory=HashConfig)

    name = "segment"
    batch = 16
    gpu = False
    threads = 1

    @classmethod
    def of(cls, recipe: CurateRecipe) -> SegmentStage:
        """The stage of a recipe."""
        return cls(recipe.scenes, recipe.motion, recipe.quality, recipe.hashes)

    @property
    def parts(self) -> Sequence[Part]:
        opencv()
        from kinema.curation.look import cuts, hashes, motion, probe, quality

        made_by: dict[str, Any] = {
            "version": VERSION,
            "cuts": cuts.VERSION,
            "scenes": None if self.scenes is None else asdict(self.scenes),
        }
        for module in (probe, motion, quality, hashes):
            made_by[module.__name__.rpartition(".")[2]] = module.VERSION
        columns = {"_clips": pa.large_string(), "clips": pa.int32(), "no_clips": pa.string()}
        depends = (*(f"_signals_{name}" for name in self._signals), "_cuts")
        return [Part("segment", columns, made_by, depends)]

    @property
    def _signals(self) -> list[str]:
        """Which signals are looked at."""
        return [n for n in ("scenes", "motion", "quality", "hashes") if getattr(self, n)]

    def time_limit_s(self, row: Row) -> float:
        return 60.0 + 0.01 * (row.get("num_frames") or 0)

    def open(self, places: Places) -> Work:
        opencv()
        if self.scenes is not None and self.scenes.detector != "none":
            scenedetect()
        stage = self

        def work(rows: Sequence[Row]) -> list[Result]:
            return [{"segment": _segment(stage, places, row)} for row in rows]

        return work


def _segment(stage: SegmentStage, places: Places, row: Row) -> dict[str, Any] | Bad:
    signals = {}
    for name in stage._signals:
        place = row.get(f"_signals_{name}")
        if place is not None:
            try:
                signals[name] = read_signals(f"{places.signals}/{place}")
            except (OSError, ValueError, BadZipFile) as error:
                what = f"{place}: {error}; delete OUT/signals/{place}, and it is made anew"
                return Bad("signals", what, passing=True)
    times = _times(row, signals.get("scenes"))
    if row.get("_cuts"):
        try:
            spans, why = given_spans(json.loads(row["_cuts"]), times)
        except (ValueError, TypeError) as error:
            return Bad("cuts", f"its list of cuts, {row['_cuts'][:80]!r}: {error}")
    elif stage.scenes is None or "scenes" not in signals:
        spans, why = [Span(0, row["num_frames"])], None
    else:
        spans, why = found_spans(signals["scenes"], times, stage.scenes, row["fps"])
    clips = [clip_of(row, span, times, signals) for span in spans]
    return {"_clips": json.dumps(clips), "clips": len(clips), "no_clips": why}


def read_signals(path: str) -> dict[str, Signal]:
    """What the pass over a source wrote.

    Raises:
        OSError, ValueError, BadZipFile: it cannot be read.
    """
    with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as arrays:
        return dict(arrays)


def found_spans(
    signals: Mapping[str, Signal], times: Signal, config: ScenesConfig, fps: float
) -> tuple[list[Span], str | None]:
    """Clips by detected scenes; where there are none, why.

    Args:
        signals: of the part `scenes`.
        times: `[N + 1]` seconds at which frames begin, and the end of the last.
        config: detectors, lengths.
        fps: of the source.
    """
    from kinema.curation.look.cuts import cuts_of

    total = len(times) - 1
    spans: list[Span] = []
    longest = 0.0
    begin = 0
    for gap_start, gap_end, trims in [
        *((gap.start, gap.end, True) for gap in cuts_of(signals, config, fps)),
        (total, total, False),
    ]:
        start = _at(times, times[begin] + config.trim_s) if begin else 0
        end = _at(times, times[gap_start] - config.trim_s) if trims else gap_start
        if end > start:
            longest = max(longest, float(times[end] - times[start]))
            spans += _lengths(start, end, times, config)
        begin = gap_end
    if spans:
        return spans, None
    longest = np.floor(longest * 100 + 1e-4) / 100  # not "1.00 s" of 0.9999 where 1 is asked for
    what = f"the longest scene has {longest:.2f} s" if longest else "no frame is lit and undamaged"
    return [], f"{what}; clips have {config.min_s:g} s or more"


def given_spans(cuts: Sequence[Any], times: Signal) -> tuple[list[Span], str | None]:
    """Clips of a list `[start_s, end_s, text, {scores}]`, as they are: neither split nor left out
    for their length, since their captions tell of all of it. Of cuts that have the same frames the
    first counts.

    Raises:
        ValueError, TypeError: it is no such list.
    """
    total = len(times) - 1
    spans: dict[tuple[int, int], Span] = {}
    for start_s, end_s, *more in cuts:
        if not (np.isfinite(start_s) and np.isfinite(end_s)):
            raise ValueError(f"{start_s} to {end_s} is no time")
        start, end = _at(times, start_s), min(total, _at(times, end_s))
        text, columns = (*more, None, None)[:2]
        if not isinstance(text or "", str) or not isinstance(columns or {}, dict):
            raise TypeError("after the times come a caption and {column: value}")
        if end > start:
            spans.setdefault((start, end), Span(start, end, text or None, columns))
    why = None if spans else f"none of the {len(cuts)} given cuts lies in the {times[-1]:.2f} s"
    return list(spans.values()), why


def clip_of(
    row: Row, span: Span, times: Signal, signals: Mapping[str, Mapping[str, Signal]]
) -> Clip:
    """The columns of one clip, as displayed."""
    from kinema.curation.look.borders import Borders, turned_borders
    from kinema.curation.look.camera import turned_label
    from kinema.curation.look.hashes import hash_columns
    from kinema.curation.look.motion import motion_columns
    from kinema.curation.look.quality import quality_columns

    start_s, end_s = float(times[span.start]), float(times[span.end])
    count, height, width = span.end - span.start, row["height"], row["width"]
    whole = span.start == 0 and span.end == row["num_frames"]
    clip: Clip = {name: v for name, v in (span.columns or {}).items() if name[:1] != "_"}
    clip |= {
        "id": row_id(row["id"], span.start, span.end),
        "start_frame": span.start,
        "end_frame": span.end,
        "whole": whole,
        "start_s": round(start_s, 6),
        "end_s": round(end_s, 6),
        "duration": round(end_s - start_s, 6),
        "num_frames": count,
        "height": height,
        "width": width,
        "aspect_ratio": height / width,
        "resolution": height * width,
        "fps": row["fps"] if whole else _rate(row["fps"], count, end_s - start_s),
        "file_size": row["file_size"] if whole else None,
    }
    if span.text:
        clip["text"] = span.text
    for name, columns in (
        ("motion", motion_columns),
        ("quality", quality_columns),
        ("hashes", hash_columns),
    ):
        if name in signals:
            clip |= columns(signals[name], span.start, span.end)
    if clip.get("camera_motion") is not None:
        clip["camera_motion"] = turned_label(clip["camera_motion"], row["rotation"])
    if clip.get("border_top") is not None:
        stored = Borders(*(clip[f"border_{side}"] for side in Borders._fields))
        for side, pixels in turned_borders(stored, row["rotation"])._asdict().items():
            clip[f"border_{side}"] = pixels
    return clip


def _lengths(start: int, end: int, times: Signal, config: ScenesConfig) -> list[Span]:
    """A scene as one clip, as several of equal length, or as none."""
    duration = float(times[end] - times[start])
    # Sums of frame times are off by rounding: what is 2 s to a microsecond is 2 s.
    if duration < config.min_s - 1e-6:
        return []
    pieces = max(1, int(np.ceil(duration / config.max_s - 1e-6)))
    marks = times[start] + duration * np.arange(1, pieces) / pieces
    edges = [start, *(_at(times, mark) for mark in marks), end]
    return [Span(a, b) for a, b in pairwise(edges) if b > a]


def _times(row: Row, signals: Mapping[str, Signal] | None) -> Signal:
    """`[N + 1]` seconds at which frames begin, and the end of the last."""
    if signals is not None:
        return np.append(signals["times"], max(row["duration"], float(signals["times"][-1])))
    return np.linspace(0.0, row["duration"], row["num_frames"] + 1)


def _at(times: Signal, moment: float) -> int:
    """The frame that begins nearest to a moment."""
    after = int(np.searchsorted(times, moment))
    if after == 0:
        return 0
    if after == len(times):
        return len(times) - 1
    return after - 1 if moment - times[after - 1] <= times[after] - moment else after


def _rate(fps: float, count: int, duration: float) -> float:
    """Frames per second of a part; the source's where it agrees, as that is exact."""
    if duration <= 0:
        return fps
    own = count / duration
    return fps if abs(own - fps) < 0.02 * fps else own
