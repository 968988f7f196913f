"""The manifest: one row per clip, held as Arrow columns.

CSV or Parquet with the same columns::

    path, text, num_frames, height, width, aspect_ratio, fps, resolution, file_size

then optional scores and labels, then `dropped_by`: why a row is not to be trained on (empty: it
is). `aspect_ratio` is height / width, `resolution` is height x width, `file_size` is in bytes.
Rows are counted from 0, here and in every message.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.config.errors import KinemaError
from kinema.data.tables import read_table, write_table

TEXT = ("path", "text")
WHOLE = ("num_frames", "height", "width", "resolution", "file_size")
REAL = ("aspect_ratio", "fps")
COLUMNS = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "fps", "resolution",
           "file_size")  # fmt: skip
NEEDED = ("path", "text", "num_frames", "height", "width", "fps")
"""Columns that cannot be worked out from others. `file_size` may be missing."""
CURE = "kinema data index FOLDER -o {} writes all columns"

Numbers = np.ndarray[Any, np.dtype[Any]]


class ManifestError(KinemaError):
    """A manifest that cannot be used as it is."""


class Manifest:
    """Clips, their captions and sizes.

    Attributes:
        table: the columns as Arrow; `path` and `text` are large strings without nulls, whole
            numbers int64, real numbers float64, `dropped_by` (always there) a large string.
        root: the folder that relative paths are below, absolute.
        source: what messages call this manifest.
    """

    def __init__(self, table: pa.Table, root: Path, *, source: str = "manifest") -> None:
        """Check and complete `table`.

        Raises:
            ManifestError: a needed column is missing or of another type, a size is missing, zero
                or not whole, a path is empty or leaves `root`; names the first rows.
        """
        self.root = Path(os.path.abspath(root))
        self.source = source
        self.table = self._complete(table)

    @classmethod
    def read(cls, path: str | Path, *, data_root: str | Path | None = None) -> Manifest:
        """Read a `.csv` or `.parquet` manifest.

        Args:
            data_root: the folder that relative paths are below; default: the manifest's own.

        Raises:
            KinemaError: the file is missing, unreadable or not a manifest.
        """
        path = Path(path)
        types = {name: pa.float64() for name in (*WHOLE, *REAL)}
        types |= {name: pa.large_string() for name in (*TEXT, "dropped_by")}
        table = read_table(path, types, hint=CURE.format(path))
        if table.num_rows == 0:
            raise ManifestError("has no rows", where=str(path), hint=CURE.format(path))
        return cls(table, Path(data_root) if data_root else path.parent, source=str(path))

    @classmethod
    def from_columns(
        cls, columns: Mapping[str, Sequence[Any] | Numbers | pa.Array], root: str | Path
    ) -> Manifest:
        """A manifest made in memory of at least the needed columns."""
        return cls(pa.table(dict(columns)), Path(root))

    def write(self, path: str | Path, *, data_root: str | Path | None = None) -> None:
        """Write as CSV or Parquet, by the ending; a file of that name is replaced at the end.

        Relative paths stay when they mean the same file from there (`data_root`, or the folder
        of `path`), otherwise they become absolute.
        """
        path = Path(path)
        table = self.table
        if Path(os.path.abspath(data_root or path.parent)) != self.root:
            column = table.column("path")
            empty = pa.scalar("", column.type)
            below = pa.scalar(f"{str(self.root).rstrip('/')}/", column.type)
            prefix = pc.if_else(pc.starts_with(column, "/"), empty, below)
            absolute = pc.binary_join_element_wise(prefix, column, empty)
            table = table.set_column(table.column_names.index("path"), "path", absolute)
        if not len(self) or pc.max(pc.binary_length(table.column("dropped_by"))).as_py() == 0:
            table = table.drop_columns(["dropped_by"])
        write_table(table, path)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> Numbers:
        """A column of numbers as a read-only array [N], without a copy.

        Missing values of optional columns are NaN, and so is `fps` of an image.

        Raises:
            ManifestError: there is no such column, or it holds text.
        """
        if name not in self.table.column_names:
            raise ManifestError(f"has no column {name!r}", where=self.source)
        column = self.table.column(name)
        if not pa.types.is_integer(column.type) and not pa.types.is_floating(column.type):
            raise ManifestError(f"column {name!r} holds {column.type}", where=self.source)
        array: Numbers = column.to_numpy()
        return array

    @functools.cached_property
    def kept(self) -> Numbers:
        """Bool [N]: True where `dropped_by` is empty."""
        mask: Numbers = pc.equal(self.table.column("dropped_by"), "").to_numpy()
        return mask

    def dropped(self) -> dict[str, int]:
        """How many rows each value of `dropped_by` took, the largest first."""
        counts = pc.value_counts(self.table.column("dropped_by")).to_pylist()
        found = {item["values"]: item["counts"] for item in counts if item["values"]}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def path(self, row: int) -> str:
        """The clip's path as it is written."""
        return str(self.table.column("path")[row].as_py())

    def text(self, row: int) -> str:
        """The clip's caption; may be empty, see `require_captions`."""
        return str(self.table.column("text")[row].as_py())

    def absolute_path(self, row: int) -> Path:
        """Where the clip is. Absolute paths are used as written, others are below `root`."""
        return self.root / self.path(row)

    @functools.cached_property
    def blank(self) -> Numbers:
        """Bool [N]: True where the caption is empty or only spaces."""
        trimmed = pc.utf8_trim_whitespace(self.table.column("text"))
        mask: Numbers = pc.equal(trimmed, "").to_numpy()
        return mask

    def require_captions(self) -> None:
        """Refuse kept rows without a caption (text-to-video training cannot use them).

        Raises:
            ManifestError: names how many, and the first rows.
        """
        rows = np.flatnonzero(self.blank & self.kept)
        if rows.size:
            raise ManifestError(
                f"{rows.size} of {int(self.kept.sum())} clips have no caption: {row_list(rows)}",
                where=self.source,
                hint=f"kinema data index FOLDER --captions CAPTIONS.csv -o {self.source}",
            )

    def with_dropped(self, reasons: Mapping[int, str]) -> Manifest:
        """The same rows with `dropped_by` set for some; what was dropped before stays so."""
        rows = sorted(row for row in reasons if self.kept[row])
        mask = np.zeros(len(self), bool)
        mask[rows] = True
        dropped = pc.replace_with_mask(
            self.table.column("dropped_by").combine_chunks(),
            pa.array(mask),
            pa.array([reasons[row] for row in rows], pa.large_string()),
        )
        position = self.table.column_names.index("dropped_by")
        table = self.table.set_column(position, "dropped_by", dropped)
        return Manifest(table, self.root, source=self.source)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of what training sees: paths, captions, sizes, rates and which rows are kept.

        The same for a CSV and a Parquet file of the same rows, whatever other columns they have.
        """
        digest = hashlib.blake2b(b"kinema manifest 1", digest_size=32)
        for name in TEXT:
            _hash_text(digest, self.table.column(name))
        for name in ("num_frames", "height", "width"):
            digest.update(np.ascontiguousarray(self.column(name), "<i8").data)
        # In thousandths: the same for 29.97 written in full, rounded, or as float32.
        thousandths = np.rint(np.nan_to_num(self.column("fps"), nan=0.0) * 1000)
        digest.update(thousandths.astype("<i8").data)
        digest.update(np.packbits(self.kept).data)
        return digest.hexdigest()

    # What follows turns a table as it was found into one that the rest can rely on.

    def _complete(self, table: pa.Table) -> pa.Table:
        missing = [name for name in NEEDED if name not in table.column_names]
        if missing:
            names = ", ".join(repr(name) for name in missing)
            raise ManifestError(
                f"has no column {names} (it has {', '.join(table.column_names)})",
                where=self.source,
                hint=CURE.format(self.source),
            )
        columns: dict[str, Any] = {name: self._as_text(table, name) for name in TEXT}
        dropped = self._as_text(table, "dropped_by")
        kept = pc.equal(dropped, "").to_numpy()
        self._check_paths(columns["path"])

        for name in ("num_frames", "height", "width"):
            columns[name] = self._whole(table, name, kept, least=1)
        height, width = columns["height"].to_numpy(), columns["width"].to_numpy()
        columns["aspect_ratio"] = self._aspect_ratio(table, height, width, kept)
        columns["fps"] = self._rate(table, columns["num_frames"].to_numpy(), kept)
        columns["resolution"] = pa.array(height * width)
        if "file_size" in table.column_names:
            columns["file_size"] = self._whole(table, "file_size", kept & False, least=0)
        others = [n for n in table.column_names if n not in columns and n != "dropped_by"]
        columns |= {name: table.column(name) for name in others}
        return pa.table(columns | {"dropped_by": dropped})

    def _as_text(self, table: pa.Table, name: str) -> pa.ChunkedArray:
        if name not in table.column_names:
            return pa.chunked_array([pa.repeat(pa.scalar("", pa.large_string()), table.num_rows)])
        column = table.column(name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        textual = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not textual and not pa.types.is_null(kind) and kind != pa.string_view():
            raise ManifestError(f"column {name!r} holds {column.type}, not text", where=self.source)
        return pc.fill_null(column.cast(pa.large_string()), "")

    def _check_paths(self, paths: pa.ChunkedArray) -> None:
        empty = pc.equal(paths, "")
        self._refuse_rows(empty.to_numpy(), "column 'path' is empty")
        odd = pc.match_substring_regex(paths, r"\x00")
        self._refuse_rows(odd.to_numpy(), "column 'path' has a NUL character")
        dots = pc.match_substring_regex(paths, r"^[^/].*(^|/)\.\.(/|$)|^\.\.(/|$)").to_numpy()
        outside = np.zeros(len(dots), bool)
        for row in np.flatnonzero(dots):
            outside[row] = os.path.normpath(paths[int(row)].as_py()).startswith("..")
        self._refuse_rows(
            outside,
            f"a relative path leaves the data folder {self.root} (`..`)",
            hint="give the folder that all paths are below as --data-root, or absolute paths",
        )

    def _numbers(self, table: pa.Table, name: str) -> Numbers:
        column = table.column(name)
        kind = column.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
            raise ManifestError(f"column {name!r} holds {kind}, not numbers", where=self.source)
        filled = pc.fill_null(column.cast(pa.float64(), safe=False), float("nan"))
        values: Numbers = filled.to_numpy()
        return values

    def _whole(self, table: pa.Table, name: str, kept: Numbers, *, least: int) -> pa.Array:
        values = self._numbers(table, name)
        known = np.nan_to_num(values, nan=-1.0, posinf=-1.0, neginf=-1.0)
        bad = (known < least) | (known != np.floor(known)) | (known >= 2**53)
        self._refuse_rows(
            bad & kept,
            f"column {name!r} must hold whole numbers of at least {least}",
            values,
            hint=CURE.format(self.source),
        )
        return pa.array(np.where(bad, 0, known).astype(np.int64))

    def _rate(self, table: pa.Table, num_frames: Numbers, kept: Numbers) -> pa.Array:
        values = self._numbers(table, "fps")
        positive = np.isfinite(values) & (values > 0)
        self._refuse_rows(
            ~positive & kept & (num_frames > 1),
            "column 'fps' must hold numbers above 0 (only an image has none)",
            values,
            hint=CURE.format(self.source),
        )
        return pa.array(np.where(positive, values, np.nan))

    def _aspect_ratio(
        self, table: pa.Table, height: Numbers, width: Numbers, kept: Numbers
    ) -> pa.Array:
        """Worked out anew, so that rounding in a file cannot move a clip to another bucket."""
        exact = height / np.maximum(width, 1)
        if "aspect_ratio" in table.column_names:
            given = self._numbers(table, "aspect_ratio")
            known = np.where(np.isfinite(given), given, exact)
            self._refuse_rows(
                (np.abs(known - exact) > 0.02 * exact) & kept,
                "column 'aspect_ratio' is not height / width",
                given,
                hint="leave the column out: it is worked out from height and width",
            )
        return pa.array(exact)

    def _refuse_rows(
        self, bad: Numbers, what: str, values: Numbers | None = None, *, hint: str | None = None
    ) -> None:
        rows = np.flatnonzero(bad)
        if rows.size:
            shown = "" if values is None else f" (row {rows[0]} has {values[rows[0]]:g})"
            raise ManifestError(f"{what}: {row_list(rows)}{shown}", where=self.source, hint=hint)


def row_list(rows: Numbers, show: int = 5) -> str:
    """`rows 3, 17 and 40 more`, counted from 0."""
    first = ", ".join(str(row) for row in rows[:show])
    more = f" and {len(rows) - show} more" if len(rows) > show else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {first}{more}"


def _hash_text(digest: Any, column: pa.ChunkedArray) -> None:
    """Feed lengths and bytes of a text column, whatever its chunks are."""
    lengths = pc.binary_length(column).to_numpy()
    digest.update(np.ascontiguousarray(lengths, "<i8").data)
    for chunk in column.chunks:
        if len(chunk):
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            if data is not None:
                digest.update(memoryview(data)[int(ends[0]) : int(ends[-1])])
