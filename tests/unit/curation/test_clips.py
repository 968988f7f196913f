"""The table of clips, put together from pieces of many sources."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from kinema.curation import clips
from kinema.curation.clips import PASSED_ON, clip_table


def source(name: str, found: list[dict[str, Any]] | None) -> dict[str, Any]:
    facts: dict[str, Any] = dict.fromkeys(PASSED_ON, 1)
    text = None if found is None else json.dumps(found)
    own = {"id": name[::-1], "state": "s", "path": f"/v/{name}", "name": name, "text": None}
    return facts | own | {"num_frames": 90, "topic": name.upper(), "_clips": text}


def clip(identity: str, start: int, end: int, **more: Any) -> dict[str, Any]:
    return {"id": identity, "start_frame": start, "end_frame": end} | more


SOURCES = [
    source("d", [clip("d2", 50, 90, flow=None), clip("d1", 0, 50, flow=2)]),
    source("b", None),
    source("c", []),
    source("a", [clip("a1", 0, 90, flow=0.5, label="pan")]),
]


@pytest.mark.parametrize("size", [1, 3, 256])
def test_pieces_make_the_same_table(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(clips, "SOURCES", size)
    table = clip_table(pa.Table.from_pylist(SOURCES))
    assert table.column("id").to_pylist() == ["a1", "d1", "d2"]  # by source and first frame
    assert table.column("flow").to_pylist() == [0.5, 2.0, None]  # whole and real numbers are real
    assert table.schema.field("flow").type == pa.float64()
    assert table.column("label").to_pylist() == ["pan", None, None]
    assert table.column("topic").to_pylist() == ["A", None, None]  # of the whole of a source only
    assert table.column("text").to_pylist() == ["", "", ""]


def test_no_clips() -> None:
    table = clip_table(pa.Table.from_pylist(SOURCES[1:3]))
    assert table.num_rows == 0
    assert "source_name" in table.column_names
