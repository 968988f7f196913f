"""Tables that are read and written a piece at a time, so that memory does not grow with them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from kinema.config.errors import KinemaError
from kinema.data.manifest import CURE, REAL, TEXT, WHOLE
from kinema.data.tables import (
    check_ending,
    check_there,
    fetched,
    read_table,
    readable_parquet,
)
from kinema.data.writing import writing
from kinema.media.stores import is_url, parent, upload
from kinema.media.write import atomic_output

ROWS = 1 << 17
"""Rows of a piece."""


class TableFile:
    """A table of clips: a manifest, or a part of one. A CSV is held in memory."""

    def __init__(self, place: str | Path, *, data_root: str | Path | None = None) -> None:
        """Look at the columns of `place` (a path, or the URL of a store).

        Args:
            data_root: the folder that relative paths are below; default: the table's own.

        Raises:
            KinemaError: it is missing or not readable, has no rows, or a column twice.
        """
        self.place = str(place)
        self.root = whole_place(data_root or parent(place))
        self._hint = CURE.format(place)
        self._file = fetched(place)
        self._table: pa.Table | None = None
        if check_there(self._file, self._hint) == ".csv":
            types = {name: pa.float64() for name in REAL}
            types |= {name: pa.large_string() for name in (*TEXT, "dropped_by")}
            types |= {name: pa.float64() for name in WHOLE}
            self._table = _whole_numbers(read_table(self._file, types, hint=self._hint))
            self.schema, self.rows = self._table.schema, self._table.num_rows
        else:
            with (
                readable_parquet(self._file, self._hint),
                pa_parquet.ParquetFile(self._file) as file,
            ):
                self.schema = file.schema_arrow.remove_metadata()
                self.rows = file.metadata.num_rows
            names = self.schema.names
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                raise KinemaError(f"column {repeated[0]!r} is there twice", where=self.place)
        if not self.rows:
            raise KinemaError("has no rows", where=self.place, hint=self._hint)

    @property
    def columns(self) -> list[str]:
        names: list[str] = self.schema.names
        return names

    def need(self, *names: str) -> None:
        """Refuse a table without these columns.

        Raises:
            KinemaError: names the columns that it has.
        """
        for name in names:
            if name not in self.columns:
                raise KinemaError(
                    f"has no column {name!r} (it has {', '.join(self.columns)})", where=self.place
                )

    def pieces(self, columns: Collection[str] | None = None) -> Iterator[pa.Table]:
        """The rows in order, some columns or all of them."""
        names = self.columns if columns is None else [n for n in self.columns if n in columns]
        if self._table is not None:
            for first in range(0, self.rows, ROWS):
                yield self._table.select(names).slice(first, ROWS)
            return
        with readable_parquet(self._file, self._hint), pa_parquet.ParquetFile(self._file) as file:
            for batch in file.iter_batches(ROWS, columns=names):
                yield pa.Table.from_batches([batch]).replace_schema_metadata(None).select(names)

    def read(self, columns: Collection[str] | None = None) -> pa.Table:
        """All rows of some columns, or of all."""
        return pa.concat_tables(self.pieces(columns))


def _whole_numbers(table: pa.Table) -> pa.Table:
    """Sizes as int64: they are read as real numbers, because `1280.0` is a size too."""
    for position, name in enumerate(table.column_names):
        if name in WHOLE:
            values = table.column(name)
            try:
                table = table.set_column(position, name, values.cast(pa.int64()))
            except pa.ArrowInvalid:
                continue  # a fraction: whoever needs a size says so
    return table


def whole_place(place: str | Path) -> str:
    """An absolute path, or a URL, without a slash at its end."""
    return str(place).rstrip("/") if is_url(place) else os.path.abspath(place)


def rooted(paths: pa.ChunkedArray | pa.Array, root: str) -> pa.ChunkedArray | pa.Array:
    """Paths with `root` before those that are relative; large_string."""
    paths = pc.fill_null(paths.cast(pa.large_string()), "")
    empty = pa.scalar("", pa.large_string())
    whole = pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://"))
    prefix = pc.if_else(whole, empty, pa.scalar(f"{root.rstrip('/')}/", pa.large_string()))
    return pc.binary_join_element_wise(prefix, paths, empty)


def moved(table: pa.Table, root: str, to: str) -> pa.Table:
    """Rows of a table below `root` for one below `to`: relative paths become absolute."""
    if root == to or "path" not in table.column_names:
        return table
    position = table.column_names.index("path")
    return table.set_column(position, "path", rooted(table.column("path"), root))


def check_place(place: str | Path) -> str:
    """`.csv` or `.parquet`, before any work is done.

    Raises:
        KinemaError: another ending, or there is a folder of that name.
    """
    return check_ending(Path(str(place).rsplit("/", 1)[-1]) if is_url(place) else Path(place))


class TableWriter:
    """Writes a table a piece at a time; see `written`."""

    def __init__(self, file: Path, schema: pa.Schema, place: str) -> None:
        self.rows = 0
        self.place = place
        self._csv = place.lower().endswith(".csv")
        self._schema = schema
        try:
            self._writer: Any = (
                pa_csv.CSVWriter(file, schema)
                if self._csv
                else pa_parquet.ParquetWriter(file, schema, compression="zstd")
            )
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self._no_form(error) from None

    def write(self, table: pa.Table) -> None:
        """Add rows; columns are cast to the schema's types."""
        try:
            self._writer.write_table(table.select(self._schema.names).cast(self._schema))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self._no_form(error) from None
        self.rows += table.num_rows

    def _no_form(self, error: Exception) -> KinemaError:
        return KinemaError(
            f"a column cannot be written: {error}",
            where=self.place,
            hint="write a .parquet" if self._csv else None,
        )

    def close(self) -> None:
        self._writer.close()


@contextmanager
def written(place: str | Path, schema: pa.Schema) -> Iterator[TableWriter]:
    """A table that appears whole at the end of the block, or not at all.

    Args:
        place: `.csv` or `.parquet`, a path or the URL of a store; what is there is replaced.

    Raises:
        KinemaError: another ending, a column that CSV cannot hold, the disk is full.
    """
    if is_url(place):
        url = str(place)
        with TemporaryDirectory() as folder:
            file = Path(folder) / url.rsplit("/", 1)[-1]
            with written(file, schema) as writer:
                yield writer
            try:
                upload(file, url)
            except OSError as error:
                what = f"cannot be written: {error.strerror or error}"
                raise KinemaError(what, where=url) from None
        return
    path = Path(place)
    check_ending(path)
    with writing(path), atomic_output(path) as temporary:
        writer = TableWriter(temporary, schema, str(path))
        try:
            yield writer
        finally:
            writer.close()


def with_column(schema: pa.Schema, fields: Mapping[str, pa.DataType]) -> pa.Schema:
    """A schema with these columns, in their place or at the end."""
    for name, type_ in fields.items():
        field = pa.field(name, type_)
        at = schema.get_field_index(name)
        schema = schema.append(field) if at < 0 else schema.set(at, field)
    return schema
