"""Results of stages, kept as they come: what has been found once is not worked out again.

Below the run's folder, one folder per part and version of it::

    stages/format.json
    stages/aesthetic/0f3a…/results.parquet     of finished runs
    stages/aesthetic/0f3a…/run-….arrows         of a run under way, or of one that was killed

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
OWN = (
    pa.field("key", pa.string()),
    pa.field("id", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("message", pa.string()),
)
"""Columns before the part's own; `reason` is null where there is a result."""


@dataclass(frozen=True)
class Known:
    """All kept results of one part."""

    table: pa.Table
    """`OWN` and the part's columns."""
    keys: NDArray[np.bytes_]
    """Sorted."""
    order: NDArray[np.int64]
    """Row of `table` for each of `keys`."""

    def find(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """The row of `table` for each key, -1 where there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.order[places], -1)

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Rows of `table`, nulls for -1."""
        return self.table.take(pa.array(rows, pa.int64(), mask=rows < 0))


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
        tables = [_read(path, schema) for path in self._files(part)]
        table = pa.concat_tables(tables) if tables else schema.empty_table()
        keys = np.asarray(table.column("key").to_numpy(zero_copy_only=False), dtype="S32")
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        # Of results that are there twice (two runs, each cut off) the last one counts.
        last = np.append(keys[1:] != keys[:-1], True) if len(keys) else np.zeros(0, bool)
        return Known(table, keys[last], order[last])

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
            names = [f"{folder}/{name}" for name in sorted(os.listdir(folder))]
        else:
            system, path = filesystem(folder)
            with store_errors(folder):
                system.invalidate_cache()
                found = system.find(path) if system.exists(path) else []
                names = [f"{folder}/{name.rsplit('/', 1)[-1]}" for name in sorted(found)]
        ours = [name for name in names if name.endswith((".parquet", ".arrows"))]
        return sorted(
            (name for name in ours if not os.path.basename(name).startswith(".")),
            key=lambda name: not name.endswith("/results.parquet"),
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
        path = Path(self.folder) / f"run-{uuid.uuid4().hex}.arrows"
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = pa.OSFile(str(path), "wb")
            self._stream = pa.ipc.new_stream(self._file, self.schema)

    def add(self, batch: pa.RecordBatch) -> None:
        with writing(self.path):
            self._stream.write_batch(batch)

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
        table = pa.Table.from_batches(self._waiting, self.schema)
        with new_file(f"{self.folder}/part-{uuid.uuid4().hex}.parquet") as file:
            pa_parquet.write_table(table, file, compression="zstd")
        self._waiting.clear()


def _read(path: str, schema: pa.Schema) -> pa.Table:
    hint = "delete this file: what it held is worked out again"
    try:
        if path.endswith(".arrows"):
            return _read_stream(path, schema)
        if is_url(path):
            table = pa_parquet.read_table(pa.BufferReader(read_bytes(path)))
        else:
            with pa_parquet.ParquetFile(path) as file:
                table = file.read()
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KinemaError(f"is damaged: {first}", where=path, hint=hint) from None


def _read_stream(path: str, schema: pa.Schema) -> pa.Table:
    """The batches that are whole: the last one may have been cut off with the run."""
    batches: list[pa.RecordBatch] = []
    with pa.OSFile(path, "rb") as file:
        # What a killed run leaves: an empty file, half a schema, half a batch.
        with suppress(pa.ArrowException, OSError, EOFError):
            reader = pa.ipc.open_stream(file)
            if reader.schema != schema:
                raise KinemaError(
                    "is damaged: it holds other columns",
                    where=path,
                    hint="delete this file: what it held is worked out again",
                )
            while True:
                try:
                    batches.append(reader.read_next_batch())
                except StopIteration:
                    break
        return pa.Table.from_batches(batches, schema)


def _compact(folder: Path, schema: pa.Schema) -> None:
    files = sorted(p for p in folder.iterdir() if p.suffix in (".parquet", ".arrows"))
    whole = folder / "results.parquet"
    others = [file for file in files if file != whole]
    if not others:
        return
    tables = [_read(str(file), schema) for file in ([whole] if whole in files else []) + others]
    with writing(whole), new_file(str(whole)) as temporary:
        pa_parquet.write_table(pa.concat_tables(tables), temporary, compression="zstd")
    for file in others:
        file.unlink()
