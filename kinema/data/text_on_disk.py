"""Paths and captions of a large manifest, left on disk.

The text of tens of millions of clips is larger than what a process should hold, and every rank of
a machine would hold it again. So a Parquet manifest with much text gets a file beside it, made
once: the same columns, not compressed, mapped into memory by all processes that need a row. What
looks at all rows (checks, hashes, which captions are blank) is worked out while it is written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

from kinema.data.writing import writing
from kinema.telemetry.progress import Progress

LARGE_ROWS = 1_000_000
LARGE_BYTES = 256 << 20
"""A file of fewer rows and less text is held in memory."""
BATCH_ROWS = 1 << 17
VERSION = 1
LOOKED_AT = ("path", "text")
"""Columns that every manifest has."""


@dataclass(frozen=True)
class TextOnDisk:
    """Text columns of one file."""

    table: pa.Table
    """Large strings, mapped; `path` and `text` without nulls."""
    blank: NDArray[np.bool_]
    """[N] where `text` is empty or only spaces."""
    digests: dict[str, str]
    """Of `path` and `text`, as `TextDigest` gives them."""


class TextDigest:
    """Hash of a text column, the same however it is cut into chunks."""

    def __init__(self) -> None:
        self._lengths = hashlib.blake2b(digest_size=32)
        self._bytes = hashlib.blake2b(digest_size=32)

    def update(self, chunk: pa.LargeStringArray) -> None:
        """Add rows.

        Args:
            chunk: without nulls.
        """
        if not len(chunk):
            return
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        self._lengths.update(np.diff(ends).astype("<i8").data)
        if data is not None:
            self._bytes.update(memoryview(data)[int(ends[0]) : int(ends[-1])])

    def hexdigest(self) -> str:
        return self._lengths.hexdigest() + self._bytes.hexdigest()


def large_text_columns(path: Path) -> list[str]:
    """The text columns of a Parquet file (but for `dropped_by`) if they are too large to be held,
    else none."""
    with pa_parquet.ParquetFile(path) as file:
        names = [
            field.name
            for field in file.schema_arrow
            if field.name != "dropped_by"
            and (pa.types.is_string(field.type) or pa.types.is_large_string(field.type))
        ]
        of_column: dict[str, int] = {}
        for group in range(file.metadata.num_row_groups):
            columns = file.metadata.row_group(group)
            for i in range(columns.num_columns):
                column = columns.column(i)
                size = of_column.get(column.path_in_schema, 0) + column.total_uncompressed_size
                of_column[column.path_in_schema] = size
        text = sum(of_column.get(name, 0) for name in names)
        return names if text > LARGE_BYTES or file.metadata.num_rows > LARGE_ROWS else []


def text_on_disk(
    path: Path, names: list[str], check: Callable[[str, pa.Array, int], None]
) -> TextOnDisk:
    """The text columns of a Parquet file, mapped from a file beside it that is made when needed.

    Several processes may ask at once: one writes, the others wait.

    Args:
        names: the columns.
        check: called once for all rows, a batch at a time, with (path or text, values, first
            row); raises if they are wrong.

    Raises:
        KinemaError: neither the folder nor the cache folder can be written, or the disk is full.
    """
    folder, stat = _folder(path), path.stat()
    made_from = {
        "version": VERSION,
        "size": stat.st_size,
        "changed": stat.st_mtime_ns,
        "columns": names,
    }
    facts = _facts(folder, made_from)  # it may be there, where nothing can be written any more
    if facts is None:
        with writing(folder / path.name):
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(folder):
                facts = _facts(folder, made_from)
                if facts is None:
                    facts = _write(path, folder, names, check, made_from)
    with pa.memory_map(str(folder / "text.arrow")) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    blank = np.load(folder / "blank.npy", mmap_mode="r")
    return TextOnDisk(table, blank, facts)


def _folder(path: Path) -> Path:
    """Beside the manifest where that can be written, else in the user's cache."""
    beside = path.absolute().parent / f".{path.name}.text"
    if beside.is_dir() or os.access(beside.parent, os.W_OK):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.blake2b(str(path.absolute()).encode(), digest_size=12).hexdigest()
    return cache / "kinema" / "manifests" / name


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _facts(folder: Path, made_from: dict[str, object]) -> dict[str, str] | None:
    """The digests, if the folder belongs to the file as it is now."""
    try:
        found = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if found.get("made_from") != made_from:
        return None
    digests: dict[str, str] = found["digests"]
    return digests


def _write(
    path: Path,
    folder: Path,
    names: list[str],
    check: Callable[[str, pa.Array, int], None],
    made_from: dict[str, object],
) -> dict[str, str]:
    (folder / "facts.json").unlink(missing_ok=True)
    digests = {name: TextDigest() for name in names if name in LOOKED_AT}
    blank: list[NDArray[np.bool_]] = []
    schema = pa.schema([(name, pa.large_string()) for name in names])
    temporary, masks = folder / f"text.arrow.{os.getpid()}", folder / f"blank.{os.getpid()}.npy"
    try:
        with (
            pa_parquet.ParquetFile(path) as file,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, schema) as out,
            Progress("text to disk", total=file.metadata.num_rows, unit="row") as bar,
        ):
            first = 0
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                columns = []
                for name in names:
                    values = batch.column(name).cast(pa.large_string())
                    if name in LOOKED_AT:
                        values = pc.fill_null(values, "")
                        check(name, values, first)
                        digests[name].update(values)
                    if name == "text":
                        blank.append(blank_rows(values))
                    columns.append(values)
                out.write_batch(pa.record_batch(columns, schema=schema))
                first += batch.num_rows
                bar.advance(batch.num_rows)
        os.replace(temporary, folder / "text.arrow")
        # As above: who has the old file mapped keeps it.
        np.save(masks, np.concatenate(blank or [np.zeros(0, np.bool_)]))
        os.replace(masks, folder / "blank.npy")
    finally:
        temporary.unlink(missing_ok=True)
        masks.unlink(missing_ok=True)
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    facts = folder / "facts.json"
    part = facts.with_suffix(".part")
    part.write_text(json.dumps({"made_from": made_from, "digests": found}), encoding="utf-8")
    os.replace(part, facts)
    return found


def blank_rows(texts: pa.Array) -> NDArray[np.bool_]:
    """Where a text is empty or only spaces."""
    return as_mask(pc.equal(pc.utf8_trim_whitespace(texts), ""))


def as_mask(values: pa.Array) -> NDArray[np.bool_]:
    """Booleans of Arrow, which has a bit for each, as NumPy's."""
    mask: NDArray[np.bool_] = values.to_numpy(zero_copy_only=False)
    return mask
