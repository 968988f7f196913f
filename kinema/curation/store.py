"""Results of stages, kept as they come: what has been found once is not worked out again.

Below the run's folder, one folder per part and version of it::

    stages/format.json
    stages/aesthetic/0f3a…/results.parquet  of finished runs; more of them where it is large
    stages/aesthetic/0f3a…/run-….arrows     of a run under way, or of one that was killed

A row's result is kept under its key (`stage.result_key`), with the row's `id`. On a disk each batch
of results is in the file when `keep` returns, so that a killed run loses none; the end of a file
that a run was writing when it died is passed over. Stores (`s3://...`) take whole files only:
results go there every few seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.curation.files import new_file
from kinema.curation.stage import Bad, Found, Part
from kinema.data.writing import writing
from kinema.media.stores import filesystem, is_url, read_bytes, store_errors

FORMAT = {"kinema_curation_results": 1}
UPLOAD_S = 10.0
"""Seconds between files that go to a store."""
FILE_BYTES = 256 << 20
"""Size at which a stream becomes a Parquet file, and another is begun."""
TAKEN = 1 << 20
"""Rows of a column's piece that is handed out."""
RESULTS = "results.parquet"
JOINED = 1024
"""Batches of a stream that become one when it is read: a row's result is a batch of its own, and
Arrow keeps some 15 KB of addresses for one."""
REMOVE = "delete this file: what it held is worked out again"
OWN = (
    pa.field("key", pa.string()),
    pa.field("id", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("message", pa.string()),
)
"""Columns before the part's own; `reason` is null where there is a result."""


class Known:
    """All kept results of one part: where each is, and their columns, read when they are asked
    for."""

    def __init__(self, schema: pa.Schema, files: Sequence[_File]) -> None:
        self._schema = schema
        self._files = files
        self._columns: dict[str, pa.Array] = {}
        keys = np.concatenate(
            [np.zeros(0, "S32"), *(_key_array(file.read("key")) for file in files)]
        )
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        # Of results that are there twice (two runs, each cut off) the last one counts.
        last = np.append(keys[1:] != keys[:-1], True) if len(keys) else np.zeros(0, bool)
        self.keys = keys[last]
        """Sorted."""
        self.order = order[last]
        """Where the result of each of `keys` is."""

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Where the result of each key is, -1 where there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.order[places], -1)

    def take(self, places: NDArray[np.int64], names: Sequence[str] | None = None) -> pa.Table:
        """Columns (default: all) at the places that `find` gave, nulls for -1."""
        names = names or self._schema.names
        columns = [self._take(places, self._schema.field(name)) for name in names]
        return pa.Table.from_arrays(columns, names=list(names))

    def _take(self, places: NDArray[np.int64], field: pa.Field) -> pa.ChunkedArray:
        if not len(self.keys):
            return pa.chunked_array([pa.nulls(len(places), field.type)])
        if field.name not in self._columns:
            # One array of each column, with 64-bit offsets: captions of ten million clips are more
            # than a column of Arrow's plain text may hold, and `take` joins the pieces each time.
            pieces = [file.read(field.name).cast(_wide(field.type)) for file in self._files]
            self._columns[field.name] = pa.concat_arrays(
                [chunk for piece in pieces for chunk in piece.chunks]
            )
        column = self._columns[field.name]
        wanted = pa.array(places, pa.int64(), mask=places < 0)
        taken = [
            column.take(wanted.slice(first, TAKEN)).cast(field.type)
            for first in range(0, len(wanted), TAKEN)
        ]
        return pa.chunked_array(taken, field.type)


class ResultStore:
    """Results below a folder or a URL; to be closed (`with`)."""

    def __init__(self, base: str) -> None:
        """
        Raises:
            KinemaError: another run has it open, it is of another version, or cannot be written.
        """
        self.base = base.rstrip("/")
        self._lock: IO[str] | None = None
        self._writers: dict[str, _Writer] = {}
        try:
            if not is_url(self.base):
                with writing(Path(self.base)):
                    os.makedirs(self.base, exist_ok=True)
                self._take_lock()
            self._check_format()
        except BaseException:
            self._release()
            raise

    def _take_lock(self) -> None:
        self._lock = open(f"{self.base}/.lock", "w")  # noqa: SIM115 (held until `close`)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KinemaError(
                "another curation run is working in this folder",
                where=os.path.dirname(self.base),
                hint="wait for it, or give another folder with -o",
            ) from None

    def _check_format(self) -> None:
        path = f"{self.base}/format.json"
        try:
            found = json.loads(read_bytes(path))
        except FileNotFoundError:
            with new_file(path) as file:
                file.write_text(json.dumps(FORMAT), encoding="utf-8")
            return
        except ValueError:
            found = None
        if found != FORMAT:
            raise KinemaError(
                f"holds results of another version ({found}, this is {FORMAT})",
                where=self.base,
                hint="give another folder with -o, or delete this one",
            )

    def known(self, part: Part) -> Known:
        """All that is kept of this version of a part.

        Raises:
            KinemaError: a file of it is damaged.
        """
        writer = self._writers.get(part.key)
        if writer is not None:
            writer.flush()
        schema = schema_of(part)
        return Known(schema, [_File(path, schema) for path in self._files(part)])

    def keep(self, part: Part, results: Sequence[tuple[str, str, Found]]) -> None:
        """Add results: (key, row's id, what was found). Passing failures are not kept.

        Raises:
            KinemaError: the disk is full, or it cannot be written.
        """
        kept = [r for r in results if not (isinstance(r[2], Bad) and r[2].passing)]
        if not kept:
            return
        writer = self._writers.get(part.key)
        if writer is None:
            folder = self._folder(part)
            kind = _StoreWriter if is_url(folder) else _DiskWriter
            writer = self._writers[part.key] = kind(folder, schema_of(part))
        writer.add(batch_of(part, kept))

    def close(self) -> None:
        """Put each part's results into one file."""
        for writer in self._writers.values():
            writer.flush()
            writer.close()
        if not is_url(self.base):
            for writer in self._writers.values():
                _compact(Path(writer.folder), writer.schema)
        self._writers.clear()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _folder(self, part: Part) -> str:
        return f"{self.base}/{part.name}/{part.key}"

    def _files(self, part: Part) -> list[str]:
        folder = self._folder(part)
        if not is_url(folder):
            if not os.path.isdir(folder):
                return []
            names = [f"{folder}/{name}" for name in os.listdir(folder)]
        else:
            system, path = filesystem(folder)
            with store_errors(folder):
                system.invalidate_cache()
                found = system.find(path) if system.exists(path) else []
                names = [f"{folder}/{name.rsplit('/', 1)[-1]}" for name in found]
        ours = [name for name in names if name.endswith((".parquet", ".arrows"))]
        return sorted(
            (name for name in ours if not os.path.basename(name).startswith(".")), key=_age
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        with suppress(KinemaError, OSError):  # what ended the run is the news
            for writer in self._writers.values():
                writer.flush()
                writer.close()
        self._release()


def schema_of(part: Part) -> pa.Schema:
    """How results of a part are kept."""
    return pa.schema([*OWN, *(pa.field(name, kind) for name, kind in part.columns.items())])


def batch_of(part: Part, results: Sequence[tuple[str, str, Found]]) -> pa.RecordBatch:
    """Results in that form.

    Raises:
        TypeError: a value is not of its column's type, or a column is not the part's: a mistake in
            the stage.
    """
    rows: list[dict[str, Any]] = []
    for key, identity, found in results:
        row: dict[str, Any] = {"key": key, "id": identity}
        if isinstance(found, Bad):
            row |= {"reason": found.reason, "message": found.message}
        else:
            strange = set(found) - set(part.columns)
            if strange:
                raise TypeError(f"part {part.name!r} does not have the columns {sorted(strange)}")
            row |= found
        rows.append(row)
    try:
        return pa.RecordBatch.from_pylist(rows, schema=schema_of(part))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise TypeError(f"part {part.name!r} gave a value of another type: {error}") from None


@dataclass
class _Writer:
    folder: str
    schema: pa.Schema

    def add(self, batch: pa.RecordBatch) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Whatever was added is there."""

    def close(self) -> None:
        """No more is added."""


@dataclass
class _DiskWriter(_Writer):
    """A stream of Arrow batches, each with the operating system when `add` returns."""

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        path = Path(self.folder) / f"run-{_stamp()}.arrows"
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = pa.OSFile(str(path), "wb")
            self._stream = pa.ipc.new_stream(self._file, self.schema)

    def add(self, batch: pa.RecordBatch) -> None:
        with writing(self.path):
            self._stream.write_batch(batch)
            size = self._file.tell()
        if size > FILE_BYTES:
            self.close()
            _replace([self.path], self.schema)
            self._begin()

    def close(self) -> None:
        with writing(self.path):
            self._stream.close()
            self._file.close()


@dataclass
class _StoreWriter(_Writer):
    """Whole files, one every few seconds."""

    _waiting: list[pa.RecordBatch] = field(default_factory=list)
    _since: float = field(default_factory=time.monotonic)

    def add(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        if time.monotonic() - self._since > UPLOAD_S:
            self.flush()

    def flush(self) -> None:
        self._since = time.monotonic()
        if not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting, self.schema).combine_chunks()
        with new_file(f"{self.folder}/part-{_stamp()}.parquet") as file:
            _write(table, file)
        self._waiting.clear()


class _File:
    """A file of results, read column by column."""

    def __init__(self, path: str, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        # A stream is looked at once: more may be added to it, or it may become another file.
        self._stream = _read_stream(path, schema) if path.endswith(".arrows") else None
        self._bytes = pa.BufferReader(read_bytes(path)) if is_url(path) else None

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
            source = self._bytes if self._bytes is not None else self._path
            with pa_parquet.ParquetFile(source, page_checksum_verification=True) as file:
                missing = sorted(set(self._schema.names) - set(file.schema_arrow.names))
                if missing:
                    raise KeyError(f"it has no column {missing[0]!r}")
                columns = file.read(list(names)).select(names)
            return columns.cast(pa.schema([self._schema.field(name) for name in names]))
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise KinemaError(f"is damaged: {first}", where=self._path, hint=REMOVE) from None


def _wide(kind: pa.DataType) -> pa.DataType:
    """The same with 64-bit offsets."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_binary(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.large_list(_wide(kind.value_type))
    return kind


def _key_array(column: pa.ChunkedArray) -> NDArray[np.bytes_]:
    keys = [np.asarray(chunk.to_numpy(zero_copy_only=False), "S32") for chunk in column.chunks]
    return np.concatenate([np.zeros(0, "S32"), *keys])


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


def _stamp() -> str:
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"


def _age(name: str | Path) -> str:
    """What sorts files from the oldest results to the newest."""
    return os.path.basename(name).partition("-")[2]


def _compact(folder: Path, schema: pa.Schema) -> None:
    """Put a run's streams and other small files into one."""
    files = sorted((p for p in folder.iterdir() if p.suffix in (".parquet", ".arrows")), key=_age)
    small = [p for p in files if p.suffix == ".arrows" or p.stat().st_size < FILE_BYTES // 4]
    if len(small) > 1 or any(file.suffix == ".arrows" for file in small):
        _replace(small, schema)


def _replace(files: Sequence[Path], schema: pa.Schema) -> None:
    """One Parquet file in place of several, which hold results of one part."""
    tables = [_File(str(file), schema).table() for file in files]
    target = files[0].with_name(RESULTS)
    if target.exists() and target not in files:
        target = target.with_name(f"{target.stem}-{_stamp()}.parquet")
    with writing(target), new_file(str(target)) as temporary:
        _write(pa.concat_tables(tables), temporary)
    # Killed here, results are there twice, which does no harm.
    for file in files:
        if file != target:
            file.unlink()


def _write(table: pa.Table, file: Path) -> None:
    pa_parquet.write_table(table, file, compression="zstd", write_page_checksum=True)
