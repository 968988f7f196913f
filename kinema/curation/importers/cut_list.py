"""A cut list: which parts of long videos are clips, as a data set's own table says.

A Parquet table with one row per source video:

- `path`: the video: absolute, relative to the cut list's folder, or a URL of a store;
- `_cuts`: JSON, `[[start_s, end_s, "caption", {"score": 0.4}], ...]`; seconds from the beginning,
  in order of time. Null: nothing is known of its parts, the whole video is to be looked at.

`kinema curate` takes it as input and cuts where it says instead of where scenes change.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.config.errors import KinemaError
from kinema.curation.importers.columns import as_text, join, tidy, to_mask
from kinema.data.table_file import moved, whole_place
from kinema.data.tables import read_table, write_table
from kinema.media.stores import is_url, parent, suffix

PATH, CUTS = "path", "_cuts"
HINT = "kinema data import NAME TABLE --videos FOLDER -o CUTS.parquet writes one"

Numbers = np.ndarray[Any, np.dtype[Any]]


def write_cut_list(path: str | Path, table: pa.Table, *, data_root: str | Path) -> None:
    """Write sources and their cuts (`cut_table`).

    Args:
        path: ends in `.parquet`; a path, or the URL of a store.
        table: columns `path` and `_cuts`; relative paths are below `data_root`.
        data_root: a folder, or its URL.

    Raises:
        KinemaError: another ending, or the file cannot be written.
    """
    place = whole_place(path)
    check_cut_list(place)
    here, root = whole_place(parent(place)), whole_place(data_root)
    if is_url(here) or is_url(root):
        table = moved(table, root, here)
    elif here != root:
        below = os.path.relpath(root, here)
        prefix = f"{root.rstrip('/')}/" if below.startswith("..") else f"{below}/"
        paths = as_text(table.column(PATH))
        bare = pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://"))
        paths = pc.if_else(bare, paths, join(prefix, paths))
        table = table.set_column(table.column_names.index(PATH), PATH, paths)
    write_table(table, place)


def check_cut_list(path: str | Path) -> None:
    """Look at the name of a cut list to be written, before any work is done.

    Raises:
        KinemaError: it does not end in `.parquet`.
    """
    if suffix(str(path)) != ".parquet":
        hint = f"{PurePosixPath(path).stem}.parquet"
        raise KinemaError("a cut list's name ends in .parquet", where=str(path), hint=hint)


def read_cut_list(path: str | Path) -> pa.Table:
    """The table of a cut list: `path` absolute (or a URL), `_cuts` text or null.

    Raises:
        KinemaError: no such file, not a cut list, an empty path, a relative path that leaves the
            cut list's folder.
    """
    path = Path(path)
    table = read_table(path, {PATH: pa.large_string(), CUTS: pa.large_string()}, hint=HINT)
    for name in (PATH, CUTS):
        if name not in table.column_names:
            raise KinemaError(f"has no column {name!r}: not a cut list", where=str(path), hint=HINT)
    paths = as_text(table.column(PATH))
    if not table.num_rows or to_mask(pc.equal(paths, "")).any():
        what = "has no rows" if not table.num_rows else "has a row without a path"
        raise KinemaError(what, where=str(path), hint=HINT)
    leaving = to_mask(pc.match_substring_regex(paths, r"(^|/)\.\.(/|$)"))
    if leaving.any():
        row = int(np.flatnonzero(leaving)[0])
        raise KinemaError(
            f"row {row}: a path leaves the cut list's folder: {paths[row].as_py()!r}",
            where=str(path),
            hint="write absolute paths",
        )
    folder = f"{os.path.abspath(path.parent).rstrip('/')}/"
    bare = pc.or_(pc.starts_with(paths, "/"), pc.match_substring(paths, "://"))
    table = table.set_column(
        table.column_names.index(PATH), PATH, pc.if_else(bare, paths, join(folder, paths))
    )
    cuts = pc.cast(table.column(CUTS), pa.large_string())
    cuts = pc.if_else(pc.equal(cuts, ""), pa.scalar(None, pa.large_string()), cuts)
    return table.set_column(table.column_names.index(CUTS), CUTS, cuts)


def cut_table(
    paths: pa.ChunkedArray,
    start_s: Numbers,
    end_s: Numbers,
    texts: pa.ChunkedArray,
    columns: Mapping[str, Any],
) -> pa.Table:
    """One row per source, of one row per clip; sources in the order in which they first appear.

    Args:
        paths: the source of each clip [N].
        start_s, end_s: seconds [N]; NaN in both: the source's parts are not known.
        texts: captions [N].
        columns: scores and labels [N] that are kept with each clip.
    """
    paths = as_text(paths).combine_chunks()
    encoded = pc.dictionary_encode(paths)
    codes: Numbers = encoded.indices.to_numpy(zero_copy_only=False)
    known = ~np.isnan(start_s)
    order = np.lexsort((start_s, codes))
    order = order[known[order]]
    clips = _clips_as_json(start_s, end_s, texts, columns).take(pa.array(order))
    counts = np.bincount(codes[order], minlength=len(encoded.dictionary))
    offsets = np.concatenate(([0], np.cumsum(counts)))
    grouped = pa.LargeListArray.from_arrays(
        pa.array(offsets, pa.int64()), _one_chunk(clips, pa.large_string())
    )
    comma = pa.scalar(",", pa.large_string())
    joined = pc.binary_join(grouped, comma)
    brackets = join("[", joined, "]").combine_chunks()
    cuts = pc.if_else(pa.array(counts > 0), brackets, pa.scalar(None, pa.large_string()))
    return pa.table({PATH: pc.cast(encoded.dictionary, pa.large_string()), CUTS: cuts})


def _clips_as_json(
    start_s: Numbers, end_s: Numbers, texts: pa.ChunkedArray, columns: Mapping[str, Any]
) -> Any:
    pieces: list[Any] = ["[", _rounded(start_s), ",", _rounded(end_s), ",", _quoted(tidy(texts))]
    if columns:
        pieces.append(",{")
        for number, (name, column) in enumerate(columns.items()):
            pieces.append(f'{"," if number else ""}"{name}":')
            kind = column.type
            if pa.types.is_integer(kind):
                pieces.append(pc.fill_null(pc.cast(column, pa.large_string()), "null"))
            elif pa.types.is_floating(kind):
                finite = pc.fill_null(pc.is_finite(column), False)
                value = pc.cast(column, pa.large_string())
                pieces.append(pc.if_else(finite, value, pa.scalar("null", pa.large_string())))
            else:
                pieces.append(_quoted(tidy(column)))
        pieces.append("}")
    pieces.append("]")
    return join(*(p if isinstance(p, str) else _one_chunk(p, pa.large_string()) for p in pieces))


def _rounded(values: Numbers) -> Any:
    """Milliseconds are what all published lists have."""
    return pc.cast(pa.array(np.round(np.nan_to_num(values), 3)), pa.large_string())


def _quoted(text: Any) -> Any:
    """Text as JSON strings; control characters are left out."""
    text = pc.replace_substring(text, "\\", "\\\\")
    text = pc.replace_substring(text, '"', '\\"')
    text = pc.replace_substring_regex(text, r"[\x00-\x1f\x7f]", "")
    return join('"', text, '"')


def _one_chunk(values: Any, kind: pa.DataType) -> Any:
    values = pc.cast(values, kind)
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
