"""From sources to clips: one row per clip that `segment` found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

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
PASSED_ON = ("codec", "bit_rate", "rotation", "audio", "variable_rate", "width", "height", "fps")
NOT_PASSED_ON = ("name", "text", "damaged", "clips", "no_clips", "_clips", "_cuts")
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
    rows = sorted(_clips(sources), key=lambda row: (row["source_name"], row["start_frame"]))
    names: dict[str, None] = dict.fromkeys(TYPES)
    for row in rows:
        names |= dict.fromkeys(row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        columns[name] = pa.array(values, TYPES.get(name)) if name in TYPES else _array(values)
    return pa.table(columns)


def _clips(sources: pa.Table) -> Iterable[dict[str, Any]]:
    others = [
        name
        for name in sources.column_names
        if name not in (*SOURCE_FACTS, *NOT_PASSED_ON, "id", "state", "path")
        and not name.startswith("_")
    ]
    for batch in sources.to_batches(max_chunksize=1024):
        for source in batch.to_pylist():
            if source["_clips"] is None:
                continue
            for clip in json.loads(source["_clips"]):
                yield _clip(source, clip, others)


def _clip(source: dict[str, Any], clip: dict[str, Any], others: list[str]) -> dict[str, Any]:
    row = {
        "state": source["state"],
        "path": source["path"],
        "source": source["path"],
        "source_name": source["name"],
        "source_id": source["id"],
    }
    row |= {f"source_{name}": source[name] for name in PASSED_ON}
    if is_whole(source, clip):
        row |= {name: source[name] for name in others}
        row["text"] = source.get("text") or ""
    given = {name: value for name, value in clip.items() if value is not None or name not in row}
    row |= given
    row["text"] = row.get("text") or ""
    return row


def is_whole(source: dict[str, Any], clip: dict[str, Any]) -> bool:
    """Whether a clip is its source from beginning to end."""
    return bool(clip["start_frame"] == 0 and clip["end_frame"] == source["num_frames"])


def _array(values: list[Any]) -> pa.Array:
    """A column of what JSON gave; whole and real numbers together are real."""
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        array = pa.array([None if v is None else float(v) for v in values], pa.float64())
    return array.cast(pa.large_string()) if pa.types.is_string(array.type) else array
