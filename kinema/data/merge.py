"""Several tables of clips into one: rows of files that only one has, columns of those that several
have.

Rows are the same clip when their files are (`path`, each below its own table's folder), or when
they agree in another column. For such rows columns are united. Where two tables have different
values, the first table's stays, and the difference is counted and shown; a missing value is never
preferred to one that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.data.expression import column_kind
from kinema.data.table_file import TableFile, rooted, whole_place, written
from kinema.media.stores import parent
from kinema.telemetry.progress import Progress

SAME = 1e-6
"""Numbers that differ by less, as a share, are the same: a CSV rounds."""


@dataclass
class Conflict:
    """A column in which tables have different values for the same clip."""

    column: str
    clips: int
    example: str
    """The first such clip, the value that stays, and the other."""


@dataclass
class Merged:
    """What became of the tables."""

    rows: int
    columns: list[str]
    repeated: dict[str, int] = field(default_factory=dict)
    """Table -> rows of clips that it has twice or more; the first one counts."""
    joined: dict[str, int] = field(default_factory=dict)
    """Table -> its clips that an earlier table has too."""
    added: dict[str, int] = field(default_factory=dict)
    """Table -> clips that no earlier one has."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Table -> clips that were left out, because the first table does not have them."""
    conflicts: list[Conflict] = field(default_factory=list)


def merge_files(
    tables: Sequence[TableFile], output: str, *, on: str = "path", left: bool = False
) -> Merged:
    """Merge tables, the first one's rows first, in order.

    Args:
        on: the column that says which rows are the same clip.
        left: only clips of the first table; the others add columns.

    Raises:
        KinemaError: a table lacks the column, or a column holds numbers here and text there.
    """
    for table in tables:
        table.need(on)
    schema = united(tables)
    root = whole_place(parent(output))
    same_root = all(table.root == root for table in tables)
    rows, result = _match(tables, on, left)
    result.columns = schema.names
    # Without a shared clip, rows go through a piece at a time.
    apart = not any(result.joined.values()) and not any(result.repeated.values()) and not left
    with (
        written(output, schema) as writer,
        Progress("merging", total=result.rows, unit="row") as bar,
    ):
        if apart:
            for table in tables:
                for piece in table.pieces():
                    writer.write(_formed(piece, schema, table.root, same_root))
                    bar.advance(piece.num_rows)
        else:
            whole = [_formed(table.read(), schema, table.root, same_root) for table in tables]
            writer.write(_joined(whole, rows, schema, on, result))
            bar.advance(result.rows)
    return result


def united(tables: Sequence[TableFile]) -> pa.Schema:
    """All columns of all tables, each with a type that holds what they have.

    Raises:
        KinemaError: numbers in one table, text in another.
    """
    types: dict[str, tuple[pa.DataType, str]] = {}
    for table in tables:
        for column in table.schema:
            if column.name not in types:
                types[column.name] = (column.type, table.place)
                continue
            before, place = types[column.name]
            types[column.name] = (_both(column, before, table.place, place), place)
    return pa.schema([(name, _plain(type_)) for name, (type_, _) in types.items()])


def _plain(type_: pa.DataType) -> pa.DataType:
    """Text in one form, so that no piece is too large for its offsets."""
    return pa.large_string() if column_kind(type_) == "text" else type_


def _both(column: pa.Field, before: pa.DataType, here: str, there: str) -> pa.DataType:
    one, other = _plain(before), _plain(column.type)
    if one == other:
        return one
    kinds = {column_kind(one), column_kind(other)}
    if kinds == {"number"}:
        whole = pa.types.is_integer(one) and pa.types.is_integer(other)
        return pa.int64() if whole else pa.float64()
    if "any" in kinds:
        return other if column_kind(one) == "any" else one
    try:
        return pa.unify_schemas(
            [pa.schema([("x", one)]), pa.schema([("x", other)])], promote_options="permissive"
        ).types[0]
    except pa.ArrowTypeError:
        raise KinemaError(
            f"column {column.name!r} holds {other} in {here} and {one} in {there}",
            hint="rename one of the two columns",
        ) from None


def _formed(table: pa.Table, schema: pa.Schema, root: str, same_root: bool) -> pa.Table:
    """A table with all columns of the schema; what it lacks is missing."""
    if not same_root and "path" in table.column_names:
        at = table.column_names.index("path")
        table = table.set_column(at, "path", rooted(table.column("path"), root))
    columns = []
    for column in schema:
        if column.name in table.column_names:
            values = table.column(column.name)
            if pa.types.is_dictionary(values.type):
                values = pc.cast(values, values.type.value_type)
            columns.append(values.cast(column.type))
        else:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, column.type)]))
    return pa.table(columns, schema=schema)


def _match(
    tables: Sequence[TableFile], on: str, left: bool
) -> tuple[list[NDArray[np.int64]], Merged]:
    """For each table the row of each clip of the result (-1: it does not have it)."""
    keys = []
    for table in tables:
        column = table.read([on]).column(on)
        keys.append(rooted(column, table.root) if on == "path" else column.cast(pa.large_string()))
    joined = pa.chunked_array([chunk for column in keys for chunk in column.chunks])
    codes = joined.combine_chunks().dictionary_encode().indices
    if codes.null_count:
        raise KinemaError(f"column {on!r} is missing in {codes.null_count} rows")
    number = codes.to_numpy().astype(np.int64)
    total = int(number.max()) + 1
    result = Merged(total, [])
    rows, first, seen = [], 0, np.zeros(total, np.bool_)
    for table in tables:
        mine = number[first : first + table.rows]
        row = np.full(total, -1, np.int64)
        row[mine[::-1]] = np.arange(table.rows)[::-1]
        there = row >= 0
        result.repeated[table.place] = table.rows - int(there.sum())
        result.joined[table.place] = int((there & seen).sum())
        new = int((there & ~seen).sum())
        result.added[table.place] = 0 if left and first else new
        result.left_out[table.place] = new if left and first else 0
        seen |= there
        rows.append(row)
        first += table.rows
    if left:
        kept = rows[0] >= 0
        rows = [row[kept] for row in rows]
        result.rows = int(kept.sum())
    return rows, result


def _joined(
    tables: Sequence[pa.Table],
    rows: Sequence[NDArray[np.int64]],
    schema: pa.Schema,
    on: str,
    result: Merged,
) -> pa.Table:
    columns = []
    key = None
    for column in [schema.field(on), *(f for f in schema if f.name != on)]:
        value = None
        for table, row in zip(tables, rows, strict=True):
            values = table.column(column.name).combine_chunks()
            mine = values.take(pa.array(row, mask=row < 0))
            mine = pc.if_else(pa.array(_missing(mine)), pa.scalar(None, column.type), mine)
            if value is None:
                value = mine
                continue
            if column.name not in (on, "path"):
                _note_conflict(column.name, value, mine, key, result)
            value = pc.coalesce(value, mine)
        assert value is not None
        if column.name == on:
            key = value
        if column_kind(column.type) == "text":
            value = pc.fill_null(value, "")
        columns.append((column.name, value))
    found = dict(columns)
    return pa.table([found[name] for name in schema.names], schema=schema)


def _missing(values: pa.Array) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = np.asarray(
        values.is_null(nan_is_null=pa.types.is_floating(values.type))
    )
    if column_kind(values.type) == "text":
        mask = mask | np.asarray(pc.fill_null(pc.equal(values, ""), True))
    return mask


def _note_conflict(
    name: str, kept: pa.Array, other: pa.Array, key: pa.Array, result: Merged
) -> None:
    both = np.flatnonzero(~(np.asarray(kept.is_null()) | np.asarray(other.is_null())))
    if not len(both):
        return
    one, two = kept.take(pa.array(both)), other.take(pa.array(both))
    kind = column_kind(kept.type)
    if kind == "number":
        a, b = (np.asarray(v.cast(pa.float64(), safe=False)) for v in (one, two))
        differ = np.abs(a - b) > SAME * np.maximum(np.abs(a), np.abs(b))
    elif kind is None:
        return  # lists and the like: the first table's are taken
    else:
        differ = np.asarray(pc.not_equal(one, two))
    if differ.any():
        at = int(np.flatnonzero(differ)[0])
        clip = key[int(both[at])].as_py()
        words = [repr(v[at].as_py())[:60] for v in (one, two)]
        example = f"{clip}: {words[0]} stays, not {words[1]}"
        result.conflicts.append(Conflict(name, int(differ.sum()), example))
