"""What is in a manifest: counts, hours, sizes, how scores are spread, what captions say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinema.data.expression import column_kind, parse, quoted
from kinema.data.filter import Rule
from kinema.data.table_file import TableFile
from kinema.data.text_on_disk import as_mask

SHAPES = {
    "16:9": 16 / 9, "9:16": 9 / 16, "4:3": 4 / 3, "3:4": 3 / 4, "1:1": 1.0, "21:9": 21 / 9,
    "1.85:1": 1.85, "3:2": 1.5, "2:3": 2 / 3,
}  # fmt: skip
"""Name -> width / height."""
SHAPE_TOLERANCE = 0.02
SIZES = ("num_frames", "height", "width", "resolution", "aspect_ratio")
"""Numbers that the table of sizes says more about."""
PLACES = frozenset(
    """id state source source_name source_id source_width source_height source_fps start_frame
    end_frame start_s end_s whole frames frames_count phash duplicate_of""".split()  # noqa: SIM905
)
"""Where a clip of curation comes from and is: nothing to look at unless it is asked for."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 20
FEW = 40
"""A text column with at most as many values is a label."""
WORDS_FROM = 200_000
"""Captions that frequent words are counted in, spread evenly over the table."""
STOP_WORDS = frozenset(
    """a an and are as at be by for from has have he her his in into is it its of on or out over she
    that the their them then there they this to up was while which who with""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Histogram:
    """How often values lie between round numbers; those beyond the ends are in the end bins."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    """One fewer than `edges`."""


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers, or an expression that is one."""

    name: str
    known: int
    missing: int
    mean: float
    least: float
    most: float
    quantiles: tuple[float, ...]
    """At `QUANTILES`."""
    histogram: Histogram


@dataclass(frozen=True)
class LabelColumn:
    """A column of few texts, or of true and false."""

    name: str
    values: list[tuple[str, int]]
    """The most frequent first; missing is ''."""


@dataclass(frozen=True)
class Captions:
    """What captions are like."""

    blank: int
    words: NumberColumn
    """How many words the others have."""
    frequent: list[tuple[str, int]]
    """Words and in how many of the captions they are; without `STOP_WORDS`."""
    looked_at: int
    """Captions that words were counted in."""


@dataclass
class Stats:
    """What is in a manifest. All but `rows` and `dropped` is about clips that are looked at."""

    rows: int
    dropped: dict[str, int]
    """Reason -> rows, the most first."""
    clips: int
    images: int = 0
    seconds: float = 0.0
    sizes: list[tuple[int, int, int, float]] = field(default_factory=list)
    """(width, height, clips, seconds), the most clips first."""
    shapes: list[tuple[str, int]] = field(default_factory=list)
    numbers: list[NumberColumn] = field(default_factory=list)
    labels: list[LabelColumn] = field(default_factory=list)
    captions: Captions | None = None


def stats_of(
    manifest: TableFile, columns: Sequence[str] = (), *, where: str | None = None
) -> Stats:
    """Look through a manifest, a column at a time.

    Args:
        columns: numbers and labels to look at (names or expressions); default: all there are.
        where: an expression: clips to look at; default: those that are not dropped.

    Raises:
        ExpressionError: a column is not there, or cannot be looked at.
    """
    mask, dropped = _looked_at(manifest, where)
    result = Stats(manifest.rows, dropped, int(mask.sum()))
    seconds = _sizes(manifest, mask, result)
    for name in columns or _default_columns(manifest):
        expression = parse(quoted(name) if name in manifest.columns else name)
        if expression.kind(manifest.schema) in ("number", "any"):
            parts = [expression.numbers(piece) for piece in manifest.pieces(expression.columns)]
            result.numbers.append(number_column(name, np.concatenate(parts)[mask]))
        else:
            labels = _labels(manifest, name, mask, always=bool(columns))
            result.labels += [labels] if labels else []
    if not columns and seconds is not None and "duration" not in manifest.columns:
        result.numbers.insert(0, number_column("duration", seconds))
    if "text" in manifest.columns and (not columns or "text" in columns):
        result.captions = _captions(manifest, mask)
    return result


def _looked_at(manifest: TableFile, where: str | None) -> tuple[NDArray[np.bool_], dict[str, int]]:
    reasons: Counter[str] = Counter()
    masks = []
    rule = None if where is None else Rule.parse(where)
    if rule is not None:
        rule.expression.check(manifest.schema)
    columns = {"dropped_by"} | (rule.columns if rule else frozenset())
    if not columns & set(manifest.columns):
        return np.ones(manifest.rows, np.bool_), {}
    for piece in manifest.pieces(columns):
        kept = np.ones(piece.num_rows, np.bool_)
        if "dropped_by" in piece.column_names:
            texts = pc.fill_null(piece.column("dropped_by").cast(pa.large_string()), "")
            for item in pc.value_counts(texts).to_pylist():
                reasons[item["values"]] += item["counts"]
            kept = as_mask(pc.equal(texts, ""))
        masks.append(kept if rule is None else rule.expression.mask(piece))
    reasons.pop("", None)
    return np.concatenate(masks), dict(sorted(reasons.items(), key=lambda i: (-i[1], i[0])))


def _sizes(
    manifest: TableFile, mask: NDArray[np.bool_], result: Stats
) -> NDArray[np.float64] | None:
    names = [n for n in ("num_frames", "height", "width", "fps") if n in manifest.columns]
    if len(names) < 4:
        return None
    table = manifest.read(names)
    frames, height, width, fps = (
        np.nan_to_num(table.column(name).cast(pa.float64()).to_numpy())[mask] for name in names
    )
    seconds = np.where(fps > 0, frames / np.where(fps > 0, fps, 1), 0.0)
    seconds[frames <= 1] = 0.0
    result.images = int((frames == 1).sum())
    result.seconds = float(seconds.sum())
    packed = height.astype(np.int64) << 32 | width.astype(np.int64)
    kinds, inverse, counts = np.unique(packed, return_inverse=True, return_counts=True)
    lengths = np.bincount(inverse.reshape(-1), seconds, minlength=len(kinds))
    sizes = [
        (int(kind & 0xFFFFFFFF), int(kind >> 32), int(count), float(length))
        for kind, count, length in zip(kinds, counts, lengths, strict=True)
    ]
    result.sizes = sorted(sizes, key=lambda size: (-size[2], size))
    shapes: Counter[str] = Counter()
    for wide, high, count, _ in sizes:
        shapes[shape_of(wide, high)] += count
    result.shapes = sorted(shapes.items(), key=lambda item: (-item[1], item[0]))
    return seconds


def shape_of(width: int, height: int) -> str:
    """`16:9`, or `other`."""
    if width <= 0 or height <= 0:
        return "unknown"
    near = min(SHAPES, key=lambda name: abs(np.log(width / height / SHAPES[name])))
    return near if abs(np.log(width / height / SHAPES[near])) < SHAPE_TOLERANCE else "other"


def _default_columns(manifest: TableFile) -> list[str]:
    return [
        column.name
        for column in manifest.schema
        if column.name not in (*SIZES, *PLACES, "path", "text", "dropped_by", "concept")
        and not column.name.startswith("_")
        and column_kind(column.type) in ("number", "text", "flag")
    ]


def number_column(name: str, values: NDArray[np.float64]) -> NumberColumn:
    """How values [rows] are spread; NaN is a missing one."""
    known = np.sort(values[np.isfinite(values)])
    missing = len(values) - len(known)
    if not len(known):
        nan = float("nan")
        empty = Histogram(np.array([0.0, 1.0]), np.zeros(1, np.int64))
        return NumberColumn(name, 0, missing, nan, nan, nan, (nan,) * len(QUANTILES), empty)
    quantiles = tuple(float(q) for q in np.quantile(known, QUANTILES))
    return NumberColumn(
        name, len(known), missing, float(known.mean()), float(known[0]), float(known[-1]),
        quantiles, histogram(known),
    )  # fmt: skip


def histogram(known: NDArray[np.float64], bins: int = BINS) -> Histogram:
    """Bins with round edges over all but the outermost 0.5 % at both ends.

    Args:
        known: ascending, at least one value.
    """
    low, high = (float(q) for q in np.quantile(known, (0.005, 0.995)))
    if high <= low:
        low, high = float(known[0]), float(known[-1])
    step = _round_step((high - low) / bins) if high > low else max(abs(high), 1.0) / 10
    if np.all(known == np.round(known)):
        step = max(step, 1.0)
    first, last = np.floor(low / step), np.floor(high / step) + 1
    edges = np.round(np.arange(first, last + 1) * step, 12)
    place = np.clip(np.searchsorted(edges, known, "right") - 1, 0, len(edges) - 2)
    return Histogram(edges, np.bincount(place, minlength=len(edges) - 1))


def _round_step(step: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(step))
    return float(next(power * n for n in (1, 2, 5, 10) if power * n >= step * (1 - 1e-9)))


def _labels(
    manifest: TableFile, name: str, mask: NDArray[np.bool_], *, always: bool
) -> LabelColumn | None:
    expression = parse(quoted(name) if name in manifest.columns else name)
    counts: Counter[str] = Counter()
    first = 0
    for piece in manifest.pieces(expression.columns):
        values = expression.value(piece).cast(pa.large_string())
        values = values.filter(pa.array(mask[first : first + piece.num_rows]))
        first += piece.num_rows
        for item in pc.value_counts(pc.fill_null(values, "")).to_pylist():
            counts[item["values"]] += item["counts"]
        if not always and len(counts) > FEW:
            return None
    return LabelColumn(name, sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _captions(manifest: TableFile, mask: NDArray[np.bool_]) -> Captions:
    lengths = []
    found: Counter[str] = Counter()
    every = max(1, -(-int(mask.sum()) // WORDS_FROM))
    first = looked_at = 0
    words = parse("words(text)")
    for whole in manifest.pieces(["text"]):
        piece = whole.filter(pa.array(mask[first : first + whole.num_rows]))
        first += whole.num_rows
        lengths.append(words.numbers(piece))
        chosen = piece.column("text").take(pa.array(np.arange(0, piece.num_rows, every)))
        looked_at += len(chosen)
        found.update(_words(chosen))
    length = np.concatenate(lengths)
    frequent = [(word, count) for word, count in found.items() if word not in STOP_WORDS]
    frequent.sort(key=lambda item: (-item[1], item[0]))
    blank = int((length == 0).sum())
    return Captions(blank, number_column("words", length[length > 0]), frequent[:40], looked_at)


def _words(texts: pa.ChunkedArray) -> dict[str, int]:
    """Word -> captions that it is in."""
    counts: Counter[str] = Counter()
    for chunk in texts.chunks:
        lower = pc.utf8_lower(pc.fill_null(chunk.cast(pa.large_string()), ""))
        lists = pc.split_pattern_regex(lower, r"[^\p{L}\p{N}'’-]+")
        table = pa.table({"row": pc.list_parent_indices(lists), "word": pc.list_flatten(lists)})
        once = table.group_by(["row", "word"]).aggregate([])
        for item in pc.value_counts(once.column("word")).to_pylist():
            counts[item["values"].strip("'’-")] += item["counts"]
    counts.pop("", None)
    return counts
