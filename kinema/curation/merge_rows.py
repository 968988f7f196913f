"""What stages found for some rows, put back into the table of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def put_back(
    table: pa.Table, some: pa.Table, rows: np.ndarray[Any, np.dtype[np.int64]]
) -> pa.Table:
    """The whole table with the columns of `some`.

    Args:
        some: further or newer columns of the rows `rows`, in that order. Where a value is null,
            the one that was there before stays.
    """
    places = np.full(table.num_rows, -1, np.int64)
    places[rows] = np.arange(len(rows))
    take = pa.array(places, mask=places < 0)
    for name in some.column_names:
        column = some.column(name).take(take)
        place = table.schema.get_field_index(name)
        if place < 0:
            table = table.append_column(pa.field(name, column.type), column)
            continue
        both = pc.coalesce(column, as_type(table.column(name), column.type))
        table = table.set_column(place, pa.field(name, column.type), both)
    return table


def as_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column that came with the clips, as the one that a stage gives; null where it is something
    else altogether (`nsfw: UNLIKELY`, where the stage gives a number)."""
    if column.type == kind:
        return column
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.chunked_array([pa.nulls(len(column), kind)])
