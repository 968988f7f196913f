"""Rows of source videos with lists of clips (`"['a', 'b']"` as Python writes them) as clips."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from kinema.curation.importers.columns import as_text
from kinema.curation.importers.findings import Findings

ROWS_AT_ONCE = 20_000
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
    label: str,
    findings: Findings,
) -> pa.Table:
    """One row per clip: `label`, the values of `lists` and `start` and `end` of `times` as text,
    `clip_number`.

    Args:
        lists: columns of lists, all as long as `times`; those that are not there are left out.
        times: column of lists of `[start, end]`.
        label: column that names a row in the report.
    """
    names = (label, times, *(name for name in lists if name in table.column_names))
    parts = []
    for first in range(0, table.num_rows, ROWS_AT_ONCE):
        # Python's objects are many times as large as Arrow's: a piece at a time.
        piece = table.slice(first, ROWS_AT_ONCE).select(list(names))
        parts.append(_explode(piece, names[2:], times, label, first, findings))
    return pa.concat_tables(parts)


def _explode(
    table: pa.Table, lists: Sequence[str], times: str, label: str, first: int, findings: Findings
) -> pa.Table:
    texts = {name: as_text(table.column(name)).to_pylist() for name in (*lists, times)}
    values: dict[str, list[str]] = {name: [] for name in (*lists, "start", "end")}
    parents: list[int] = []
    numbers: list[int] = []
    for row, name in enumerate(as_text(table.column(label)).to_pylist()):
        try:
            ranges = parse_list(texts[times][row])
            columns = {column: parse_list(texts[column][row]) for column in lists}
            if any(len(items) != len(ranges) for items in columns.values()):
                raise ValueError("its lists are not of one length")
            pairs = [(str(start), str(end)) for start, end in ranges]
        except (ValueError, TypeError) as error:
            what = f"a list cannot be read: {error}"[:200]
            findings.add("bad_row", f"{name} (row {first + row})", what)
            continue
        for number, (start, end) in enumerate(pairs):
            parents.append(row)
            numbers.append(number)
            values["start"].append(start)
            values["end"].append(end)
            for column in lists:
                values[column].append(str(columns[column][number]))
    result = {label: as_text(table.column(label)).take(pa.array(parents, pa.int64()))}
    result |= {name: pa.array(items, pa.large_string()) for name, items in values.items()}
    return pa.table(result | {"clip_number": pa.array(numbers, pa.int64())})
