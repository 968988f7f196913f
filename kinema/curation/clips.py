"""From sources to clips: one row per clip that `segment` found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

SOURCE_FACTS = (
    "width",
    "height",
    "num_frames",
    "fps",
    "duration",
    "codec",
    "bit_rate",
    "rotation",
    "audio",
    "variable_rate",
    "aspect_ratio",
    "file_size",
)
"""What a clip has of its own; the source's becomes `source_codec` and so on."""
PASSED_ON = ("codec", "bit_rate", "rotation", "audio", "variable_rate", "width", "height", "fps",
             "pixel_aspect")  # fmt: skip
NOT_PASSED_ON = ("name", "text", "damaged", "clips", "no_clips", "_clips", "_cuts")
MADE_HERE = frozenset(
    ("state", "path", "source", "source_name", "source_id", "frames", "frames_count", "gop",
     "cut_by", "lost_s", "dropped_by", *(f"source_{name}" for name in PASSED_ON))
)  # fmt: skip
"""Columns that are this run's own: what a table or a list of cuts has under these names (another
run's manifest does) is about other files."""
PLACES = frozenset(
    ("whole", "start_frame", "end_frame", "start_s", "end_s", "resolution", "border_top",
     "border_bottom", "border_left", "border_right", "border_share")
)  # fmt: skip
"""As `MADE_HERE`; `segment` gives them."""
SOURCES = 256
"""Sources whose clips are Python values at once."""
TYPES = {
    "id": pa.large_string(),
    "state": pa.large_string(),
    "path": pa.large_string(),
    "source": pa.large_string(),
    "source_name": pa.large_string(),
    "source_id": pa.large_string(),
    "text": pa.large_string(),
}


def clip_table(sources: pa.Table) -> pa.Table:
    """One row per clip, by source name and first frame.

    A clip that is the whole of its source keeps the source's caption and its table's other columns
    (a data set's own scores); of a part of a video they would be a guess.

    Args:
        sources: with `_clips` (JSON, null where the source was bad).
    """
    # A piece at a time: rows of Python values take some ten times the memory of columns.
    others = _others(sources)
    pieces = [_columns(rows) for rows in _pieces(sources, others) if rows]
    names = list(dict.fromkeys([*TYPES, *(name for piece in pieces for name in piece)]))
    table = pa.table({name: _joined(name, pieces) for name in names})
    for name in others:  # rules may be about them, also where no clip is whole
        if name not in names:
            kind = sources.schema.field(name).type
            table = table.append_column(name, pa.nulls(table.num_rows, kind))
    if not pieces:
        return table
    # Sources of one name, and cuts that overlap: their order is not left to chance.
    keys = [(name, "ascending") for name in ("source_name", "start_frame", "end_frame", "id")]
    return table.take(pc.sort_indices(table, keys))


def _others(sources: pa.Table) -> list[str]:
    """Columns of the sources' own table that clips which are whole keep."""
    return [
        name
        for name in sources.column_names
        if name not in (*SOURCE_FACTS, *NOT_PASSED_ON, "id", *MADE_HERE, *PLACES)
        and not name.startswith("_")
    ]


def _pieces(sources: pa.Table, others: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows of clips, of some sources at once."""
    for batch in sources.to_batches(max_chunksize=SOURCES):
        yield [
            _clip(source, clip, others)
            for source in batch.to_pylist()
            if source["_clips"] is not None
            for clip in json.loads(source["_clips"])
        ]


def _clip(source: dict[str, Any], clip: dict[str, Any], others: list[str]) -> dict[str, Any]:
    row = {
        "state": source["state"],
        "path": source["path"],
        "source": source["path"],
        "source_name": source["name"],
        "source_id": source["id"],
    }
    row |= {f"source_{name}": source.get(name) for name in PASSED_ON}
    if is_whole(source, clip):
        row |= {name: source[name] for name in others}
        row["text"] = source.get("text") or ""
    row |= {
        name: value
        for name, value in clip.items()
        if name not in MADE_HERE and (value is not None or name not in row)
    }
    row["text"] = row.get("text") or ""
    return row


def is_whole(source: dict[str, Any], clip: dict[str, Any]) -> bool:
    """Whether a clip is its source from beginning to end."""
    return bool(clip["start_frame"] == 0 and clip["end_frame"] == source["num_frames"])


def _columns(rows: list[dict[str, Any]]) -> dict[str, pa.Array]:
    names: dict[str, None] = {}
    for row in rows:
        if not row.keys() <= names.keys():
            names |= dict.fromkeys(row)
    return {name: column_of([row.get(name) for row in rows], TYPES.get(name)) for name in names}


def column_of(values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    """A column of what JSON or several tables gave; whole and real numbers together are real,
    numbers and text together are text."""
    try:
        array = pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if all(v is None or isinstance(v, (int, float)) for v in values):
            array = pa.array([None if v is None else float(v) for v in values], pa.float64())
        else:
            array = pa.array([None if v is None else _text(v) for v in values], pa.large_string())
    return array.cast(pa.large_string()) if pa.types.is_string(array.type) else array


def _joined(name: str, pieces: list[dict[str, pa.Array]]) -> pa.Array:
    """One column of all pieces, null in those that do not have it."""
    fields = [pa.field(name, piece[name].type) for piece in pieces if name in piece]
    kind = TYPES.get(name)
    if kind is None:
        schemas = [pa.schema([field]) for field in dict.fromkeys(fields)]
        try:
            kind = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            kind = pa.large_string()
    arrays = [
        _as(piece[name], kind) if name in piece else pa.nulls(len(piece["id"]), kind)
        for piece in pieces
    ]
    return pa.concat_arrays(arrays) if arrays else pa.nulls(0, kind)


def columns_of_cuts(lists: pa.ChunkedArray) -> set[str]:
    """Names of the scores that come with lists of cuts (`_cuts`); what is none is passed over."""
    names: set[str] = set()
    for chunk in lists.chunks:
        for text in chunk:
            try:
                cuts = json.loads(text.as_py() or "[]")
                names |= {name for cut in cuts for name in (cut[3] if len(cut) > 3 else None) or ()}
            except (ValueError, TypeError, KeyError):
                continue
    return {name for name in names if isinstance(name, str)} - MADE_HERE


def _as(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type != kind and pa.types.is_large_string(kind):
        return pa.array([None if v is None else _text(v) for v in array.to_pylist()], kind)
    return array.cast(kind)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
