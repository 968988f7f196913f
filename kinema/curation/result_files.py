"""Files of results: streams of a run under way, Parquet files, and copies of those in stores."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pa_parquet

from kinema.config.errors import KinemaError
from kinema.curation.files import put
from kinema.data.writing import writing
from kinema.media.stores import files_below, of_each, read_bytes, remove
from kinema.media.write import atomic_output

FILE_BYTES = 256 << 20
"""Size at which a stream becomes a Parquet file, and another is begun."""
JOINED = 1024
"""Batches of a stream that become one when it is read: a row's result is a batch of its own, and
Arrow keeps some 15 KB of addresses for one."""
TRIES = 5
"""Times that a folder is listed whose files go away while they are read."""
REMOVE = "delete this file: what it held is worked out again"


class ResultFile:
    """A file of results, read column by column."""

    def __init__(self, path: str, schema: pa.Schema, name: str | None = None) -> None:
        """
        Args:
            name: what messages call it, where it is the copy of another.
        """
        self.path = path
        self.name = name or path
        self._schema = schema
        # A stream is looked at once: more may be added to it, or it may become another file.
        self._stream = _read_stream(path, schema) if path.endswith(".arrows") else None

    def read(self, name: str) -> pa.ChunkedArray:
        """One column, of the type that it has in the schema."""
        if self._stream is not None:
            return self._stream.column(name)
        return self.table([name]).column(name)

    def table(self, names: Sequence[str] | None = None) -> pa.Table:
        """Columns, all by default."""
        if self._stream is not None:
            return self._stream
        names = names or self._schema.names
        try:
            with pa_parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                missing = sorted(set(self._schema.names) - set(file.schema_arrow.names))
                if missing:
                    raise KeyError(f"it has no column {missing[0]!r}")
                columns = file.read(list(names)).select(names)
            return columns.cast(pa.schema([self._schema.field(name) for name in names]))
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise KinemaError(f"is damaged: {first}", where=self.name, hint=REMOVE) from None


class StoredFiles:
    """The files of a store, each fetched once: a file of a name never changes there."""

    def __init__(self) -> None:
        self._here: TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Delete the copies."""
        if self._here is not None:
            self._here.cleanup()
            self._here = None

    def of(self, folder: str, schema: pa.Schema) -> list[ResultFile]:
        """All files of a folder, the oldest first."""
        self._open()
        for _ in range(TRIES):
            urls = [f"{folder}/{name}" for name in self._names(folder)]
            with suppress(FileNotFoundError):  # another run has just put it together with others
                list(of_each(self._fetch, urls))
                return [ResultFile(str(self._copy(url)), schema, url) for url in urls]
        raise KinemaError("its files come and go", where=folder, hint="wait for other runs to end")

    def add(self, url: str, table: pa.Table) -> None:
        """Write a new file."""
        self._open()
        copy = self._copy(url)
        with writing(copy):
            write_results(table, copy)
        put(copy, url)

    def join(self, folder: str, schema: pa.Schema) -> None:
        """Put small files into one."""
        files = self.of(folder, schema)
        small = [f for f in files if os.path.getsize(f.path) < FILE_BYTES // 4]
        if len(small) < 2:
            return
        tables = [file.table() for file in small]
        self.add(f"{folder}/part-{stamp()}.parquet", pa.concat_tables(tables))
        for file in small:
            with suppress(FileNotFoundError):  # another run did the same
                remove(file.name)

    def _names(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError):
            return ours(files_below(folder))
        return []

    def _open(self) -> None:
        if self._here is None:
            self._here = TemporaryDirectory(prefix="kinema-results-")

    def _copy(self, url: str) -> Path:
        assert self._here is not None
        *_, part, key, name = url.split("/")
        return Path(self._here.name) / f"{part}-{key}-{name}"

    def _fetch(self, url: str) -> None:
        copy = self._copy(url)
        if not copy.is_file():
            data = read_bytes(url)
            with writing(copy), atomic_output(copy) as temporary:
                temporary.write_bytes(data)


def _read_stream(path: str, schema: pa.Schema) -> pa.Table:
    """The batches that are whole: the last one may have been cut off with the run."""
    batches: list[pa.RecordBatch] = []
    joined: list[pa.Table] = []
    if not os.path.getsize(path):
        return schema.empty_table()
    with pa.memory_map(path) as file:
        # What a killed run leaves: an empty file, half a schema, half a batch.
        with suppress(pa.ArrowException, OSError, EOFError):
            reader = pa.ipc.open_stream(file)
            if reader.schema != schema:
                raise KinemaError("is damaged: it holds other columns", where=path, hint=REMOVE)
            while True:
                try:
                    batches.append(reader.read_next_batch())
                except StopIteration:
                    break
                if len(batches) == JOINED:
                    joined.append(pa.Table.from_batches(batches, schema).combine_chunks())
                    batches.clear()
        joined.append(pa.Table.from_batches(batches, schema).combine_chunks())
        return pa.concat_tables(joined)


def ours(names: Iterable[str]) -> list[str]:
    """Files of results, the oldest first."""
    found = [n for n in names if n.endswith((".parquet", ".arrows")) and not n.startswith(".")]
    return sorted(found, key=age)


def stamp() -> str:
    """Part of a new file's name; see `age`."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


def age(name: str | Path) -> str:
    """What sorts files from the oldest results to the newest."""
    return os.path.basename(name).partition("-")[2]


def write_results(table: pa.Table, file: Path) -> None:
    """Write a Parquet file whose damage is found when it is read."""
    pa_parquet.write_table(table, file, compression="zstd", write_page_checksum=True)
