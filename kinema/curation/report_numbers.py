"""What the report says in figures, from a manifest of any size.

Numbers of all rows are looked at; captions, paths and pictures of a sample only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

from kinema.data.tables import fetched, read_table
from kinema.media.stores import Place

Mask = NDArray[np.bool_]
Numbers = NDArray[np.float64]

FILTER, NOT_CUT = "filter: ", "not cut: "
BINS = 48
SAMPLED_CAPTIONS = 20_000
BASIC = {
    "num_frames", "height", "width", "aspect_ratio", "fps", "resolution", "file_size",
    "start_frame", "end_frame", "start_s", "end_s", "frames_count", "concept", "concept_rank",
    "gop", "lost_s", "clips",
    "border_top", "border_bottom", "border_left", "border_right", "hash_distance",
}  # fmt: skip
"""Numbers that are no scores. Those of the source (`source_...`) are none either."""
FIRST = ("aesthetic", "match", "motion_mv", "flow", "sharpness", "ocr_area", "nsfw", "watermark",
         "brightness", "blockiness", "duration")  # fmt: skip
"""Scores that people ask for first."""
NOT_SEEN = {"duration"}
"""Scores that pictures say nothing about."""
STOP_WORDS = frozenset(
    ("a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "have", "in", "into",
     "is", "it", "its", "of", "on", "or", "over", "that", "the", "their", "there", "they", "this",
     "to", "was", "were", "which", "while", "with")
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A bar of the funnel."""

    name: str
    rows: int
    """What is left after it."""
    hours: float | None
    dropped: int = 0
    """What this step took."""
    rule: bool = False


@dataclass(frozen=True)
class Histogram:
    """A score's distribution over clips; the outer bins hold all that is beyond."""

    name: str
    edges: Numbers
    kept: NDArray[np.int64]
    dropped: NDArray[np.int64]
    missing: int
    quantiles: tuple[float, float, float]
    """5 %, 50 %, 95 %."""
    thresholds: tuple[tuple[str, float], ...]
    """(comparison, value) of rules about this column alone."""


@dataclass(frozen=True)
class Band:
    """Clips whose score is in one part of its range."""

    low: float
    high: float
    rows: int
    sample: tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """What captions are made of."""

    captions: int
    """Kept clips with a caption."""
    empty: int
    sampled: int
    edges: Numbers
    lengths: NDArray[np.int64]
    """Captions by their number of words."""
    median: float
    frequent: tuple[tuple[str, int], ...]
    """Words that are no stop words -> captions that have them."""
    beginnings: tuple[tuple[str, int], ...]
    """First three words -> captions."""


@dataclass
class ClipTable:
    """Columns of a manifest that fit in memory, and access to rows of the others."""

    path: Path
    numbers: dict[str, Numbers]
    labels: dict[str, NDArray[np.object_]]
    """Text columns of few values."""
    dropped_by: NDArray[np.object_]
    names: list[str]
    _table: pa.Table | None = field(default=None, repr=False)

    @classmethod
    def read(cls, place: Place) -> ClipTable:
        """Read a manifest's numbers and labels.

        Raises:
            KinemaError: there is none, or it is not readable.
        """
        path = fetched(str(place))
        hint = "give the folder of a finished `kinema curate`"
        parquet = path.suffix.lower() == ".parquet"
        if not parquet or not path.is_file():
            types = dict.fromkeys((*_LABELS, "id", "path", "text", "frames"), pa.large_string())
            table = read_table(path, types, hint=hint)
            names = table.column_names
        else:
            with pa_parquet.ParquetFile(path) as file:
                schema = file.schema_arrow
                names = list(schema.names)
                wanted = [f.name for f in schema if _is_number(f.type) or f.name in _LABELS]
                table = file.read(wanted)
        numbers = {
            f.name: table.column(f.name).cast(pa.float64(), safe=False).to_numpy()
            for f in table.schema
            if _is_number(f.type) and not f.name.startswith("_")
        }
        labels = {
            name: table.column(name).to_numpy()
            for name in _LABELS
            if name in table.column_names and name != "dropped_by"
        }
        rows = table.num_rows
        empty = np.full(rows, "", object)
        dropped = empty
        if "dropped_by" in names:
            column = table.column("dropped_by").cast(pa.large_string())
            dropped = pc.fill_null(column, "").to_numpy()
        return cls(path, numbers, labels, dropped, names, None if parquet else table)

    def __len__(self) -> int:
        return len(self.dropped_by)

    @property
    def kept(self) -> Mask:
        """Bool [N]: clips that no rule dropped."""
        return np.asarray(self.dropped_by == "", bool)

    @property
    def seconds(self) -> Numbers:
        """[N] length of each clip, NaN where it is not known."""
        if "duration" in self.numbers:
            return self.numbers["duration"]
        if {"num_frames", "fps"} <= self.numbers.keys():
            with np.errstate(divide="ignore", invalid="ignore"):
                return self.numbers["num_frames"] / self.numbers["fps"]
        return np.full(len(self), np.nan)

    def hours(self, rows: Mask | None = None) -> float:
        """Hours of video of some rows, or of all."""
        seconds = self.seconds if rows is None else self.seconds[rows]
        return float(np.nansum(np.where(np.isfinite(seconds), seconds, 0)) / 3600)

    def rows(self, wanted: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
        """Columns of some rows, in the order asked for; columns that are not there are None."""
        there = [name for name in names if name in self.names]
        blank = dict.fromkeys(names)
        order = sorted(set(wanted))
        found: dict[int, dict[str, Any]] = {}
        if self._table is not None:
            values = self._table.select(there).take(pa.array(order, pa.int64())).to_pylist()
            found = dict(zip(order, values, strict=True))
        elif order and there:
            places = np.array(order)
            first = 0
            with pa_parquet.ParquetFile(self.path) as file:
                # A piece at a time: captions of a million clips are never in memory together.
                for batch in file.iter_batches(1 << 16, columns=there):
                    here = places[(places >= first) & (places < first + batch.num_rows)]
                    if here.size:
                        picked = batch.take(pa.array(here - first)).to_pylist()
                        found |= dict(zip(here.tolist(), picked, strict=True))
                    first += batch.num_rows
        return [blank | found.get(row, {}) for row in wanted]


_LABELS = ("dropped_by", "camera_motion", "source_codec", "caption_model", "duplicate_of",
           "similar_to")  # fmt: skip


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def funnel(clips: ClipTable, counts: Sequence[Any], rules: Sequence[str]) -> list[Step]:
    """From files to kept clips: the run's own counts, then what took clips in the manifest.

    Args:
        counts: `Count`s of the run.
        rules: in the order they were applied; what dropped clips beside them stands before.
    """
    steps = [Step(count.name, count.rows, count.hours) for count in counts]
    if not steps or steps[-1].rows != len(clips):
        steps.append(Step("clips in the manifest", len(clips), clips.hours()))
    causes = np.array([_cause(text) for text in clips.dropped_by], object)
    found = Counter(cause for cause in causes if cause)
    others = sorted((c for c in found if c not in set(rules)), key=lambda c: (-found[c], c))
    left = np.ones(len(clips), bool)
    for cause in [*others, *rules]:
        left &= causes != cause
        steps.append(
            Step(
                cause, int(left.sum()), clips.hours(left), found.get(cause, 0), cause in set(rules)
            )
        )
    return steps


def _cause(dropped_by: str) -> str:
    for before in (FILTER, NOT_CUT):
        if dropped_by.startswith(before):
            return dropped_by[len(before) :]
    return dropped_by


def scores(clips: ClipTable) -> list[str]:
    """Columns of scores that have a value, the well-known ones first."""
    names = [
        name
        for name, values in clips.numbers.items()
        if name not in BASIC and not name.startswith("source_") and np.isfinite(values).any()
    ]
    known = [name for name in FIRST if name in names]
    return known + [name for name in names if name not in FIRST]


def histogram(clips: ClipTable, name: str, rules: Sequence[str]) -> Histogram:
    """How a score is distributed over kept and dropped clips."""
    values = clips.numbers[name]
    finite = np.isfinite(values)
    known, limits = values[finite], thresholds(name, rules)
    edges = _edges(known, [value for _, value in limits])
    clipped = np.clip(values, edges[0], edges[-1])
    kept = clips.kept
    return Histogram(
        name,
        edges,
        np.histogram(clipped[finite & kept], edges)[0],
        np.histogram(clipped[finite & ~kept], edges)[0],
        int((~finite).sum()),
        tuple(np.percentile(known, (5, 50, 95)).tolist()),
        limits,
    )


def _edges(known: Numbers, limits: Sequence[float]) -> Numbers:
    low, high = float(known.min()), float(known.max())
    inner = np.percentile(known, (0.5, 99.5))
    if high - low > 4 * (inner[1] - inner[0]) > 0:
        low, high = float(inner[0]), float(inner[1])
    low, high = min([low, *limits]), max([high, *limits])
    if high <= low:
        half = max(abs(low), 1.0) / 2
        low, high = low - half, high + half
    return np.linspace(low, high, BINS + 1)


_NUMBER = r"(-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
_COMPARED = r"(<=|>=|==|<|>)"
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "=="}


def thresholds(name: str, rules: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """What rules compare a column with, where they do so directly: `(">=", 4.5)`."""
    found = []
    column = rf"(?<![\w.(]){re.escape(name)}(?![\w(])"
    for rule in rules:
        for sign, value in re.findall(rf"{column}\s*{_COMPARED}\s*{_NUMBER}", rule):
            found.append((sign, float(value)))
        for value, sign in re.findall(rf"(?<![\w.]){_NUMBER}\s*{_COMPARED}\s*{column}", rule):
            found.append((_TURNED[sign], float(value)))
    return tuple(dict.fromkeys(found))


def bands(
    clips: ClipTable, name: str, *, count: int = 5, each: int = 5, seed: int = 0
) -> list[Band]:
    """Parts of a score's range with about as many clips each, and a random sample of each.

    Values that many clips share are in one band, so that there may be fewer bands.
    """
    values = clips.numbers[name]
    rows = np.flatnonzero(np.isfinite(values))
    known = values[rows]
    edges = np.unique(np.percentile(known, np.linspace(0, 100, count + 1)))
    random = np.random.default_rng([seed, *name.encode()])
    found = []
    for k in range(max(1, len(edges) - 1)):
        low, high = float(edges[k]), float(edges[min(k + 1, len(edges) - 1)])
        last = k >= len(edges) - 2
        inside = rows[(known >= low) & ((known <= high) if last else (known < high))]
        sample = random.choice(inside, min(each, len(inside)), replace=False)
        if len(inside):
            order = sample[np.argsort(values[sample], kind="stable")]
            found.append(Band(low, high, len(inside), tuple(order.tolist())))
    return found


def words(clips: ClipTable, *, seed: int = 0) -> Words | None:
    """What the captions of kept clips are made of, from a sample; None without captions."""
    if "text" not in clips.names:
        return None
    rows = np.flatnonzero(clips.kept)
    random = np.random.default_rng([seed, 17])
    if len(rows) > SAMPLED_CAPTIONS:
        rows = np.sort(random.choice(rows, SAMPLED_CAPTIONS, replace=False))
    texts = [str(row["text"] or "").strip() for row in clips.rows(rows.tolist(), ["text"])]
    full = [text for text in texts if text]
    if not full:
        return None
    lengths = np.array([len(text.split()) for text in full])
    seen: Counter[str] = Counter()
    starts: Counter[str] = Counter()
    for text in full:
        parts = re.findall(r"[\w'’-]+", text.lower())
        seen.update({part for part in parts if part not in STOP_WORDS and not part.isdigit()})
        if len(parts) >= 3:
            starts[" ".join(parts[:3])] += 1
    step = max(1, math.ceil(float(np.percentile(lengths, 99.5)) / 30))
    edges = np.arange(0.0, 31 * step, step)
    share = int(clips.kept.sum()) / max(1, len(texts))
    return Words(
        captions=round(len(full) * share),
        empty=round((len(texts) - len(full)) * share),
        sampled=len(texts),
        edges=edges,
        lengths=np.histogram(np.clip(lengths, 0, edges[-1]), edges)[0],
        median=float(np.median(lengths)),
        frequent=tuple(seen.most_common(40)),
        beginnings=tuple((s, n) for s, n in starts.most_common(8) if n > 1),
    )


def groups(
    clips: ClipTable, column: str, *, shown: int = 6, each: int = 5, seed: int = 0
) -> tuple[int, int, list[tuple[str, list[int]]]]:
    """Duplicates and what they are duplicates of.

    Returns:
        How many clips are duplicates, of how many kept ones, and examples: the id of the kept clip
        and rows of its duplicates.
    """
    if column not in clips.labels:
        return 0, 0, []
    names = clips.labels[column]
    rows = np.array([k for k, name in enumerate(names) if name], np.int64)
    if not rows.size:
        return 0, 0, []
    members: dict[str, list[int]] = {}
    for row in rows.tolist():
        members.setdefault(str(names[row]), []).append(row)
    random = np.random.default_rng([seed, 23])
    keys = sorted(members)
    largest = sorted(keys, key=lambda key: (-len(members[key]), key))[: shown // 2]
    rest = [key for key in keys if key not in set(largest)]
    picked = random.choice(rest, min(shown - len(largest), len(rest)), replace=False).tolist()
    return len(rows), len(members), [(key, members[key][:each]) for key in [*largest, *picked]]


def rows_of_ids(clips: ClipTable, ids: Sequence[str]) -> dict[str, int]:
    """Rows of clips by their `id`; those that are not there are left out."""
    wanted, found, first = set(ids), {}, 0
    if "id" not in clips.names or not wanted:
        return {}
    if clips._table is not None:
        columns = [clips._table.column("id").combine_chunks()]
    else:
        with pa_parquet.ParquetFile(clips.path) as file:
            columns = [b.column(0) for b in file.iter_batches(1 << 17, columns=["id"])]
    for column in columns:
        for offset, value in enumerate(column.to_pylist()):
            if value in wanted:
                found[value] = first + offset
        first += len(column)
    return found
