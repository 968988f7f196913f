"""Rows of source videos with lists of clips (`"['a', 'b']"` as Python writes them) as clips."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from kinema.curation.importers.columns import as_text
from kinema.curation.importers.findings import Findings

MAX_CHARACTERS = 4 << 20
"""Of one list; the parser's memory grows with it."""


def parse_list(text: str) -> list[Any]:
    """The values of a list in Python's or JSON's notation: nothing is run.

    Raises:
        ValueError: it is none.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError("too long")
    try:
        if '"' not in text and "\\" not in text:
            # Python writes a text with an apostrophe in double quotes, so here none is inside.
            value = json.loads(text.replace("'", '"'))
        else:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("is not a list") from None
    if not isinstance(value, list | tuple):
        raise ValueError("is not a list")
    return list(value)


def explode(
    table: pa.Table,
    lists: Sequence[str],
    *,
    times: str,
    scalars: Sequence[str],
    label: str,
    findings: Findings,
) -> pa.Table:
    """One row per clip: the values of `lists`, `start` and `end` of `times`, `clip_number`.

    Args:
        lists: columns of lists, all as long as `times`; those that are not there are left out.
        times: column of lists of `[start, end]`.
        scalars: columns that are repeated.
        label: column that names a row in the report.
    """
    there = [name for name in lists if name in table.column_names]
    texts = {name: as_text(table.column(name)).to_pylist() for name in (*there, times)}
    names = as_text(table.column(label)).to_pylist()
    values: dict[str, list[Any]] = {name: [] for name in (*there, "start", "end")}
    parents: list[int] = []
    numbers: list[int] = []
    for row, name in enumerate(names):
        try:
            ranges = parse_list(texts[times][row])
            columns = {column: parse_list(texts[column][row]) for column in there}
            if any(len(items) != len(ranges) for items in columns.values()):
                raise ValueError("its lists are not of one length")
            pairs = [(str(start), str(end)) for start, end in ranges]
        except (ValueError, TypeError) as error:
            findings.add("bad_row", f"{name} (row {row})", f"a list cannot be read: {error}"[:200])
            continue
        for number, (start, end) in enumerate(pairs):
            parents.append(row)
            numbers.append(number)
            values["start"].append(start)
            values["end"].append(end)
            for column in there:
                values[column].append(columns[column][number])
    rows = pa.array(parents, pa.int64())
    result = {name: table.column(name).take(rows) for name in (*scalars, label)}
    result |= {name: _array(items) for name, items in values.items()}
    return pa.table(result | {"clip_number": pa.array(numbers, pa.int64())})


def _array(items: list[Any]) -> pa.Array:
    if all(isinstance(item, int | float) for item in items):
        return pa.array([float(item) for item in items], pa.float64())
    return pa.array([item if isinstance(item, str) else str(item) for item in items],
                    pa.large_string())  # fmt: skip
