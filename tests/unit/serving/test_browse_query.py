"""Which clips the page shows: the same as a plain loop over rows finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest
from kinema.serving.browse.columns import bin_edges
from kinema.serving.browse.edits import Edits
from kinema.serving.browse.query import ClipTable, Query, words

N = 400


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(3)
    colours = ["red", "Blue", "GREEN", "", "İstanbul"]
    return [
        {
            "path": f"{k}.mp4",
            "text": f"A {colours[k % 5]} shape number {k}",
            "num_frames": int(random.integers(24, 48)),
            "height": 64,
            "width": 64,
            "fps": 8.0,
            "aesthetic": None if k % 7 == 0 else float(random.normal(5, 1)),
            "label": None if k % 11 == 0 else ["x", "y", ""][k % 3],
            "sharp": bool(k % 2),
            "dropped_by": "filter: aesthetic >= 4" if k % 4 == 1 else "",
        }
        for k in range(N)
    ]


@pytest.fixture
def clips(rows: list[dict[str, Any]], tmp_path: Path) -> ClipTable:
    manifest = Manifest(pa.Table.from_pylist(rows), tmp_path)
    return ClipTable(manifest, Edits(tmp_path / "m.edits.jsonl", manifest.path, len(manifest)))


def asked(**values: Any) -> Query:
    return Query.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({}, lambda r: not r["dropped_by"]),
        ({"show": "dropped"}, lambda r: bool(r["dropped_by"])),
        ({"show": "all"}, lambda r: True),
        ({"search": "RED"}, lambda r: not r["dropped_by"] and "red" in r["text"].lower()),
        ({"search": "İSTANBUL"}, lambda r: not r["dropped_by"] and "İstanbul" in r["text"]),
        ({"search": '"shape number 1" 2'},
         lambda r: not r["dropped_by"] and "shape number 1" in r["text"] and "2" in r["text"]),
        ({"show": "all", "ranges": {"aesthetic": [4.5, 5.5]}},
         lambda r: r["aesthetic"] is not None and 4.5 <= r["aesthetic"] <= 5.5),
        ({"show": "all", "ranges": {"aesthetic": [None, 4]}},
         lambda r: r["aesthetic"] is not None and r["aesthetic"] <= 4),
        ({"show": "all", "values": {"label": ["x", None]}}, lambda r: r["label"] in ("x", None)),
        ({"show": "all", "values": {"label": [""]}}, lambda r: r["label"] == ""),
        ({"show": "all", "values": {"sharp": ["true"]}}, lambda r: r["sharp"]),
        ({"filter": "aesthetic >= 5 and width == 64"},
         lambda r: not r["dropped_by"] and r["aesthetic"] is not None and r["aesthetic"] >= 5),
    ],
)  # fmt: skip
def test_queries_find_what_a_loop_finds(
    clips: ClipTable,
    rows: list[dict[str, Any]],
    query: dict[str, Any],
    wanted: Callable[[dict[str, Any]], bool],
) -> None:
    expected = [k for k, row in enumerate(rows) if wanted(row)]
    assert expected, "the case must find something"
    assert clips.rows(asked(**query)).tolist() == expected


def test_sorting_puts_missing_values_last_both_ways(
    clips: ClipTable, rows: list[dict[str, Any]]
) -> None:
    for descending in (False, True):
        order = clips.rows(asked(show="all", sort="aesthetic", descending=descending)).tolist()
        values = [rows[k]["aesthetic"] for k in order]
        known = [v for v in values if v is not None]
        assert values[len(known) :] == [None] * (N - len(known))
        assert known == sorted(known, reverse=descending)
    by_text = [rows[k]["text"] for k in clips.rows(asked(show="all", sort="text"))]
    assert by_text == sorted(by_text, key=str.encode)
    shuffled = clips.rows(asked(show="all", sort="?")).tolist()
    assert sorted(shuffled) == list(range(N)) != shuffled


def test_histograms_count_every_row_once(clips: ClipTable, rows: list[dict[str, Any]]) -> None:
    query = asked(show="all", search="red", ranges={"aesthetic": [5, None]})
    found = clips.histogram("aesthetic", query)
    with_value = [row for row in rows if row["aesthetic"] is not None]
    assert sum(found["all"]) == len(with_value)
    # Its own range is left aside, so that it can be widened again.
    assert sum(found["chosen"]) == sum("red" in row["text"] for row in with_value)
    assert found["missing"][0] == N - len(with_value)
    values = clips.histogram("label", query)["values"]
    assert {v[0]: v[1] for v in values} == {
        v: sum(row["label"] == v for row in rows) for v in ("x", "y", "", None)
    }
    assert sum(v[2] for v in values) == sum(
        "red" in row["text"] and (row["aesthetic"] or 0) >= 5 for row in rows
    )


def test_far_values_do_not_squeeze_the_others() -> None:
    values = np.concatenate([np.linspace(0, 1, 1000), [1e6]])
    edges = bin_edges(values)
    assert edges[-1] < 2
    assert bin_edges(np.array([3.0, 3.0])).tolist() == [2.5, 3.5]
    assert bin_edges(np.array([1.5, 1.5])).tolist() == [0.75, 2.25]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"filter": "asthetic >= 5"}, "asthetic"),
        ({"filter": "aesthetic >="}, "aesthetic >="),
        ({"sort": "nothing"}, "nothing"),
        ({"ranges": {"text": [0, 1]}}, "no numbers"),
        ({"show": "some"}, "some"),
        ({"ranges": {"aesthetic": "x"}}, "not a query"),
    ],
)
def test_what_cannot_be_asked_is_told(
    clips: ClipTable, query: dict[str, Any], message: str
) -> None:
    with pytest.raises(KinemaError, match=message):
        clips.rows(asked(**query))


def test_edits_are_found_filtered_and_sorted_as_edited(clips: ClipTable) -> None:
    clips.edits.set_text(2, "zebra crossing")
    clips.edits.set_marks([2, 4], True)
    assert clips.rows(asked(search="ZEBRA")).tolist() == [2]
    assert clips.rows(asked(filter='contains(text, "zebra")')).tolist() == [2]
    assert clips.rows(asked(edited=True)).tolist() == [2]
    assert clips.rows(asked(marked=True)).tolist() == [2, 4]
    assert clips.row(2)["_original"] == "A GREEN shape number 2"
    clips.edits.set_text(2, None)
    assert clips.rows(asked(search="zebra")).tolist() == []


def test_words_of_a_search() -> None:
    assert words('red "blue sky"  x "') == ["red", "blue sky", "x"]
