"""Results of stages, kept as they come: what has been found once is not worked out again.

Below the run's folder, one folder per part and version of it::

    stages/format.json
    stages/aesthetic/0f3a…/results.parquet  of finished runs; more of them where it is large
    stages/aesthetic/0f3a…/run-….arrows     of a run under way, or of one that was killed

A row's result is kept under its key (`stage.result_key`), with the row's `id`. On a disk each batch
of results is in the file when `keep` returns, so that a killed run loses none; the end of a file
that a run was writing when it died is passed over. Stores (`s3://...`) take whole files only:
results go there every few seconds, in files `part-….parquet`, and what a killed run had not sent is
worked out again.

A folder is locked; a store has no locks, and needs none: files there never change, each run adds
files of its own, and one that puts files together writes the new one before it deletes the others.
Two runs at once may work out the same twice, and lose nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.curation.files import new_file
from kinema.curation.result_files import (
    FILE_BYTES,
    ResultFile,
    StoredFiles,
    age,
    ours,
    stamp,
    write_results,
)
from kinema.curation.stage import Bad, Found, Part
from kinema.data.writing import writing
from kinema.media.stores import is_url, read_bytes

FORMAT = {"kinema_curation_results": 1}
UPLOAD_S = 10.0
"""Seconds between files that go to a store."""
TAKEN = 1 << 20
"""Rows of a column's piece that is handed out."""
RESULTS = "results.parquet"
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

    def __init__(self, schema: pa.Schema, files: Sequence[ResultFile]) -> None:
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
        self._copies = StoredFiles()
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
        if is_url(self.base):
            return Known(schema, self._copies.of(self._folder(part), schema))
        return Known(schema, [ResultFile(path, schema) for path in self._files(part)])

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
            folder, schema = self._folder(part), schema_of(part)
            writer = self._writers[part.key] = (
                _StoreWriter(folder, schema, self._copies)
                if is_url(folder)
                else _DiskWriter(folder, schema)
            )
        writer.add(batch_of(part, kept))

    def close(self) -> None:
        """Put each part's results into one file."""
        for writer in self._writers.values():
            writer.flush()
            writer.close()
        for writer in self._writers.values():
            if is_url(self.base):
                self._copies.join(writer.folder, writer.schema)
            else:
                _compact(Path(writer.folder), writer.schema)
        self._writers.clear()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self._copies.close()

    def _folder(self, part: Part) -> str:
        return f"{self.base}/{part.name}/{part.key}"

    def _files(self, part: Part) -> list[str]:
        folder = self._folder(part)
        if not os.path.isdir(folder):
            return []
        return [f"{folder}/{name}" for name in ours(os.listdir(folder))]

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
        path = Path(self.folder) / f"run-{stamp()}.arrows"
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

    copies: StoredFiles
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
        self.copies.add(f"{self.folder}/part-{stamp()}.parquet", table)
        self._waiting.clear()


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


def _compact(folder: Path, schema: pa.Schema) -> None:
    """Put a run's streams and other small files into one."""
    files = sorted((p for p in folder.iterdir() if p.suffix in (".parquet", ".arrows")), key=age)
    small = [p for p in files if p.suffix == ".arrows" or p.stat().st_size < FILE_BYTES // 4]
    if len(small) > 1 or any(file.suffix == ".arrows" for file in small):
        _replace(small, schema)


def _replace(files: Sequence[Path], schema: pa.Schema) -> None:
    """One Parquet file in place of several, which hold results of one part."""
    tables = [ResultFile(str(file), schema).table() for file in files]
    target = files[0].with_name(RESULTS)
    if target.exists() and target not in files:
        target = target.with_name(f"{target.stem}-{stamp()}.parquet")
    with writing(target), new_file(str(target)) as temporary:
        write_results(pa.concat_tables(tables), temporary)
    # Killed here, results are there twice, which does no harm.
    for file in files:
        if file != target:
            file.unlink()
