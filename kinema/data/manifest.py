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
from kinema.data.tables import check_there, fetched, read_table, readable_parquet, write_table
from kinema.data.text_on_disk import (
    TextDigest,
    TextOnDisk,
    as_mask,
    blank_rows,
    large_text_columns,
    text_on_disk,
)
from kinema.media.stores import is_url, join, parent

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

    Text of a large Parquet file stays on disk (`text_on_disk`), and is looked at when first asked
    for: planning needs none of it.

    Attributes:
        root: the folder that relative paths are below: an absolute path, or the URL of a store.
        source: what messages call this manifest.
    """

    def __init__(
        self,
        table: pa.Table,
        root: Path | str,
        *,
        source: str = "manifest",
        text_file: tuple[Path, Sequence[str]] | None = None,
    ) -> None:
        """Check and complete `table`.

        Args:
            text_file: a Parquet file, and its text columns that `table` lacks.

        Raises:
            ManifestError: a needed column is missing or of another type, a size is missing, zero
                or not whole, a path is empty or leaves `root`; names the first rows.
        """
        self.root = _absolute(root)
        self.source = source
        self._text_file = text_file
        self._held = self._complete(table)

    @classmethod
    def read(cls, path: str | Path, *, data_root: str | Path | None = None) -> Manifest:
        """Read a `.csv` or `.parquet` manifest.

        Args:
            path: a path, or the URL of a store.
            data_root: the folder that relative paths are below, or the URL of a store; default:
                the manifest's own.

        Raises:
            KinemaError: the file is missing, unreadable or not a manifest.
        """
        root, source = data_root or parent(path), str(path)
        hint = CURE.format(path)
        path = fetched(path)
        types = {name: pa.float64() for name in (*WHOLE, *REAL)}
        types |= {name: pa.large_string() for name in (*TEXT, "dropped_by")}
        on_disk: list[str] = []
        if check_there(path, hint) == ".parquet":
            with readable_parquet(path, hint):
                on_disk = large_text_columns(path)
        table = read_table(path, types, hint=hint, leave=on_disk)
        if table.num_rows == 0:
            raise ManifestError("has no rows", where=source, hint=hint)
        text_file = (path, on_disk) if on_disk else None
        return cls(table, root, source=source, text_file=text_file)

    @classmethod
    def from_columns(
        cls, columns: Mapping[str, Sequence[Any] | Numbers | pa.Array], root: str | Path
    ) -> Manifest:
        """A manifest made in memory of at least the needed columns."""
        return cls(pa.table(dict(columns)), root)

    def write(self, path: str | Path, *, data_root: str | Path | None = None) -> None:
        """Write as CSV or Parquet, by the ending; a file of that name is replaced at the end.

        Relative paths stay when they mean the same file from there (`data_root`, or the folder
        of `path`), otherwise they become absolute.
        """
        table = self.table
        if _absolute(data_root or parent(path)) != self.root:
            column = table.column("path")
            empty = pa.scalar("", column.type)
            below = pa.scalar(f"{str(self.root).rstrip('/')}/", column.type)
            whole = pc.or_(pc.starts_with(column, "/"), pc.match_substring(column, "://"))
            prefix = pc.if_else(whole, empty, below)
            absolute = pc.binary_join_element_wise(prefix, column, empty)
            table = table.set_column(table.column_names.index("path"), "path", absolute)
        if not len(self) or pc.max(pc.binary_length(table.column("dropped_by"))).as_py() == 0:
            table = table.drop_columns(["dropped_by"])
        write_table(table, path)

    @functools.cached_property
    def table(self) -> pa.Table:
        """The columns as Arrow; `path` and `text` are large strings without nulls, whole numbers
        int64, real numbers float64, `dropped_by` (always there) a large string.

        Raises:
            KinemaError: text that was left on disk is wrong, or cannot be put into form there.
        """
        if self._text is None:
            return self._held
        columns = {n: self._text.table.column(n) for n in self._text.table.column_names}
        columns |= {n: self._held.column(n) for n in self._held.column_names}
        names = [n for n in COLUMNS if n in columns]
        return pa.table({n: columns[n] for n in (*names, *(n for n in columns if n not in names))})

    @property
    def text_was_read(self) -> bool:
        """Whether captions can be looked at without reading gigabytes first."""
        return self._text_file is None or "_text" in self.__dict__

    @functools.cached_property
    def _text(self) -> TextOnDisk | None:
        if self._text_file is None:
            return None
        path, names = self._text_file

        def check(name: str, values: pa.Array, first_row: int) -> None:
            if name == "path":
                self._check_paths(values, first_row)

        return text_on_disk(path, list(names), check)

    def __len__(self) -> int:
        return int(self._held.num_rows)

    def column(self, name: str) -> Numbers:
        """A column of numbers as a read-only array [N], without a copy.

        Missing values of optional columns are NaN, and so is `fps` of an image.

        Raises:
            ManifestError: there is no such column, or it holds text.
        """
        if name not in self._held.column_names:
            held = self._text_file is not None and name in self._text_file[1]
            what = f"column {name!r} holds text" if held else f"has no column {name!r}"
            raise ManifestError(what, where=self.source)
        column = self._held.column(name)
        if not pa.types.is_integer(column.type) and not pa.types.is_floating(column.type):
            raise ManifestError(f"column {name!r} holds {column.type}", where=self.source)
        array: Numbers = column.to_numpy()
        return array

    @functools.cached_property
    def kept(self) -> Numbers:
        """Bool [N]: True where `dropped_by` is empty."""
        mask: Numbers = pc.equal(self._held.column("dropped_by"), "").to_numpy()
        return mask

    def dropped(self) -> dict[str, int]:
        """How many rows each value of `dropped_by` took, the largest first."""
        counts = pc.value_counts(self._held.column("dropped_by")).to_pylist()
        found = {item["values"]: item["counts"] for item in counts if item["values"]}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def path(self, row: int) -> str:
        """The clip's path as it is written."""
        return str(self.table.column("path")[row].as_py())

    def text(self, row: int) -> str:
        """The clip's caption; may be empty, see `require_captions`."""
        return str(self.table.column("text")[row].as_py())

    def absolute_path(self, row: int) -> Path | str:
        """Where the clip is: a path, or the URL of a store. Absolute paths and URLs are used as
        written, others are below `root`."""
        return join(self.root, self.path(row))

    @functools.cached_property
    def blank(self) -> Numbers:
        """Bool [N]: True where the caption is empty or only spaces."""
        if self._text is not None:
            return self._text.blank
        chunks = [blank_rows(chunk) for chunk in self.table.column("text").chunks]
        return np.concatenate(chunks or [np.zeros(0, np.bool_)])

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
        digest = hashlib.blake2b(b"kinema manifest 2", digest_size=32)
        for name in TEXT:
            digest.update(self._text_digest(name).encode())
        self._add_sizes(digest)
        digest.update(np.packbits(self.kept).data)
        return digest.hexdigest()

    @functools.cached_property
    def video_fingerprint(self) -> str:
        """Hash of what frames are read from: paths, sizes and rates. Captions may change."""
        digest = hashlib.blake2b(b"kinema videos 1", digest_size=32)
        digest.update(self._text_digest("path").encode())
        self._add_sizes(digest)
        return digest.hexdigest()

    def _text_digest(self, name: str) -> str:
        if self._text is not None:
            return self._text.digests[name]
        digest = TextDigest()
        for chunk in self.table.column(name).chunks:
            digest.update(chunk)
        return digest.hexdigest()

    def _add_sizes(self, digest: Any) -> None:
        for name in ("num_frames", "height", "width"):
            digest.update(np.ascontiguousarray(self.column(name), "<i8").data)
        # In thousandths: the same for 29.97 written in full, rounded, or as float32.
        thousandths = np.rint(np.nan_to_num(self.column("fps"), nan=0.0) * 1000)
        digest.update(thousandths.astype("<i8").data)

    # What follows turns a table as it was found into one that the rest can rely on.

    def _complete(self, table: pa.Table) -> pa.Table:
        on_disk = self._text_file[1] if self._text_file else ()
        missing = [name for name in NEEDED if name not in (*table.column_names, *on_disk)]
        if missing:
            names = ", ".join(repr(name) for name in missing)
            raise ManifestError(
                f"has no column {names} (it has {', '.join(table.column_names)})",
                where=self.source,
                hint=CURE.format(self.source),
            )
        held = [name for name in TEXT if name not in on_disk]
        columns: dict[str, Any] = {name: self._as_text(table, name) for name in held}
        dropped = self._as_text(table, "dropped_by")
        kept = pc.equal(dropped, "").to_numpy()
        if "path" in columns:
            first_row = 0
            for chunk in columns["path"].chunks:
                self._check_paths(chunk, first_row)
                first_row += len(chunk)

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

    def _check_paths(self, paths: pa.Array, first_row: int) -> None:
        """Refuse rows whose path cannot be used.

        Args:
            first_row: what row the first of `paths` is.
        """
        refuse = functools.partial(self._refuse_rows, first_row=first_row)
        refuse(as_mask(pc.equal(paths, "")), "column 'path' is empty")
        refuse(as_mask(pc.match_substring(paths, "\x00")), "column 'path' has a NUL character")
        # Nearly all are told from the few with dots by this cheap look.
        suspects = np.flatnonzero(as_mask(pc.match_substring(paths, "..")))
        outside = np.zeros(len(paths), bool)
        for row in suspects:
            path = paths[int(row)].as_py()
            outside[row] = not path.startswith("/") and os.path.normpath(path).split("/")[0] == ".."
        refuse(
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
        self,
        bad: Numbers,
        what: str,
        values: Numbers | None = None,
        *,
        hint: str | None = None,
        first_row: int = 0,
    ) -> None:
        rows = np.flatnonzero(bad)
        if rows.size:
            shown = "" if values is None else f" (row {rows[0]} has {values[rows[0]]:g})"
            listed = row_list(rows + first_row)
            raise ManifestError(f"{what}: {listed}{shown}", where=self.source, hint=hint)


def row_list(rows: Numbers, show: int = 5) -> str:
    """`rows 3, 17 and 40 more`, counted from 0."""
    first = ", ".join(str(row) for row in rows[:show])
    more = f" and {len(rows) - show} more" if len(rows) > show else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {first}{more}"


def _absolute(root: str | Path) -> Path | str:
    return str(root).rstrip("/") if is_url(root) else Path(os.path.abspath(root))
