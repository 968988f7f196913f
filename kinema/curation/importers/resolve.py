"""Which videos the rows of a table mean: clips that are there, or parts of videos that are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.config.errors import KinemaError
from kinema.curation.importers.columns import (
    Mask,
    as_text,
    fields,
    fill,
    is_numeric,
    numbers,
    seconds,
    tidy,
    to_mask,
)
from kinema.curation.importers.dataset import SIZES, DataSet, Form, Ranges, Rows
from kinema.curation.importers.findings import Findings
from kinema.curation.importers.video_folder import Match, VideoFolder

OURS = frozenset(
    {"path", "text", *SIZES, "aspect_ratio", "resolution", "file_size", "duration", "dropped_by"}
)
"""Columns of a manifest that an import makes; a published column of that name is not kept."""

Kind = Literal["clips", "cuts"]


@dataclass
class Resolved:
    """Rows with a video."""

    kind: Kind
    folder: VideoFolder
    files: np.ndarray[Any, np.dtype[np.int64]]
    """Number of the file in `folder.files` [N]."""
    text: pa.ChunkedArray
    columns: dict[str, Any]
    """Scores and labels under our names [N]."""
    sizes: dict[str, np.ndarray[Any, Any]]
    """What the table says of `SIZES` [N], NaN where it says nothing."""
    start_s: np.ndarray[Any, Any] | None = None
    end_s: np.ndarray[Any, Any] | None = None
    notes: tuple[str, ...] = ()


def resolve(
    data_set: DataSet,
    rows: Rows,
    folder: VideoFolder,
    findings: Findings,
    prefer: Kind | None = None,
) -> Resolved:
    """Find each row's clip, or the video it is a part of; what is not found is reported.

    Args:
        prefer: `clips`: take only clips that were cut already; `cuts`: only ranges of longer
            videos. None: what more rows have.

    Raises:
        KinemaError: no row has a video.
    """
    table, form = rows.table, rows.form
    clips = [t for t in form.clips if set(fields(t)) <= set(table.column_names)]
    found: list[tuple[int, Kind, Match, Ranges | None]] = []
    if clips and prefer != "cuts":
        match = _find(table, clips, folder, data_set)
        found.append((int((match.files >= 0).sum()), "clips", match, None))
    for part in form.ranges if prefer != "clips" else ():
        if not {part.start, part.end} <= set(table.column_names):
            continue
        match = _find(table, part.sources, folder, data_set)
        usable = _usable(table, part)
        match = Match(np.where(usable, match.files, -1), match.unsafe, match.ambiguous)
        found.append((int((match.files >= 0).sum()), "cuts", match, part))
    if not found:
        raise KinemaError(
            f"{data_set.title} has no {prefer} to import",
            where=str(folder.folder),
            hint="leave --as out",
        )
    best = max(found, key=lambda item: item[0])
    count, kind, match, ranges = best
    if count == 0:
        raise _nothing_found(data_set, table, clips, form, folder)
    notes = list(rows.notes)
    for other, other_kind, _, _ in found:
        if other and other_kind != kind:
            notes.append(
                f"{other:,} rows also have {_what(other_kind)}; --as {other_kind} takes those"
            )
    keep = _kept_rows(table, form, match, ranges, findings, folder, data_set.numbered)
    kept = table if len(keep) == table.num_rows else table.take(pa.array(keep))
    start_s, end_s = _times(kept, ranges) if ranges else (None, None)
    text = tidy(kept.column(rows.text)) if rows.text else _blank(len(keep))
    return Resolved(
        kind,
        folder,
        match.files[keep],
        text,
        _columns(rows, kept, findings, folder, match.files[keep]),
        _sizes(form, kept),
        start_s,
        end_s,
        tuple(notes),
    )


def _what(kind: Kind) -> str:
    return "a clip that is cut already" if kind == "clips" else "the whole video"


def _find(
    table: pa.Table, templates: tuple[str, ...] | list[str], folder: VideoFolder, data_set: DataSet
) -> Match:
    files = np.full(table.num_rows, -1, np.int64)
    unsafe = np.zeros(table.num_rows, bool)
    ambiguous = np.zeros(table.num_rows, bool)
    for template in templates:
        if not set(fields(template)) <= set(table.column_names):
            continue
        keys = fill(template, table)
        rest = files < 0
        if not rest.any():
            break
        keys = pc.if_else(pa.array(rest), keys, pa.scalar("", pa.large_string()))
        match = folder.find(keys, unique_names=data_set.unique_names)
        files = np.where(rest, match.files, files)
        unsafe |= match.unsafe
        ambiguous |= match.ambiguous
    return Match(files, unsafe, ambiguous & (files < 0))


def _times(table: pa.Table, ranges: Ranges) -> tuple[Any, Any]:
    start, _ = seconds(table.column(ranges.start))
    end, _ = seconds(table.column(ranges.end))
    return start, end


def _usable(table: pa.Table, ranges: Ranges) -> Mask:
    """Rows with times that make a range (or without, where that means the whole video)."""
    start, end = _times(table, ranges)
    good: Mask = (end > start) & (start >= 0)
    if ranges.whole:
        unknown = np.isnan(end) & np.isnan(start)
        good |= unknown | (np.isnan(end) & (start == 0))
    return good


def _kept_rows(
    table: pa.Table,
    form: Form,
    match: Match,
    ranges: Ranges | None,
    findings: Findings,
    folder: VideoFolder,
    numbered: bool,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows with a video that no earlier row has; the others go to the report."""
    templates = list(ranges.sources if ranges else form.clips)
    template = next(t for t in templates if set(fields(t)) <= set(table.column_names))
    keys = fill(template, table)
    blank = to_mask(pc.equal(keys, ""))
    lost = match.files < 0
    bad_time = np.zeros(len(lost), bool)
    if ranges is not None:
        bad_time = lost & ~_usable(table, ranges)
    reasons = (
        ("unsafe_path", match.unsafe, "its path leaves the folder"),
        ("no_name", lost & blank, "it names no video"),
        ("bad_time", bad_time, "its times are missing, no times, or end before they start"),
        ("ambiguous", match.ambiguous, "the name fits several videos or several rows"),
        ("no_file", lost, f"there is no such video in {folder.folder}"),
    )
    told = np.zeros(len(lost), bool)
    for reason, mask, message in reasons:
        _report(findings, reason, mask & ~told, keys, message, numbered)
        told |= mask
    good = np.flatnonzero(~told)
    same: dict[str, Any] = {"file": match.files[good]}
    if ranges is not None:
        start, end = _times(table, ranges)
        same |= {"start": np.nan_to_num(start[good], nan=-1)}
        same |= {"end": np.nan_to_num(end[good], nan=-1)}
    first = _first_of_each(same)
    repeated = np.ones(len(good), bool)
    repeated[first] = False
    mask = np.zeros(len(lost), bool)
    mask[good[repeated]] = True
    what = "an earlier row has this part" if ranges else "an earlier row has this video"
    _report(findings, "repeated", mask, keys, what, numbered)
    return good[first]


def _first_of_each(columns: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The first row of each combination of values, ascending."""
    count = len(next(iter(columns.values())))
    table = pa.table(columns | {"row": np.arange(count)})
    first = table.group_by(list(columns)).aggregate([("row", "min")])
    rows: np.ndarray[Any, np.dtype[np.int64]] = first.column("row_min").to_numpy()
    return np.sort(rows)


def _report(
    findings: Findings, reason: str, mask: Mask, keys: Any, message: str, numbered: bool
) -> None:
    rows = np.flatnonzero(mask)
    if rows.size:
        names = keys.take(pa.array(rows)).to_pylist()
        if numbered:
            names = [f"row {row}: {name}" for row, name in zip(rows, names, strict=True)]
        findings.add_all(reason, names, message)


def _blank(count: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.repeat(pa.scalar("", pa.large_string()), count)])


def _columns(
    rows: Rows, table: pa.Table, findings: Findings, folder: VideoFolder, files: Any
) -> dict[str, Any]:
    """Scores and labels, and `source`: the id of the video a clip was cut from."""
    form = rows.form
    result: dict[str, Any] = {}
    for published, ours in form.numbers.items():
        if published in table.column_names:
            values, bad = numbers(table.column(published))
            result[ours] = pa.array(values, from_pandas=True)
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                seen = as_text(table.column(published))[row].as_py()
                findings.add(
                    "bad_number", published, f"{int(bad.sum())} values, the first {seen!r}"
                )
    for published, ours in form.labels.items():
        if published in table.column_names and published != rows.text:
            result[ours] = tidy(table.column(published))
    if form.all_columns:
        result |= _all_columns(rows, table)
    source = _source(form, table, folder, files)
    if source is not None:
        result["source"] = source
    return {name: column for name, column in result.items() if name not in OURS}


def _all_columns(rows: Rows, table: pa.Table) -> dict[str, Any]:
    used = {*rows.form.used(), rows.text} - set(rows.form.sizes.values())
    sized = set(rows.form.sizes.values())
    result: dict[str, Any] = {}
    for name in table.column_names:
        column = table.column(name)
        kept = "_".join(name.split()).lstrip("_") or "column"
        if name in used or name in sized or kept in OURS or pa.types.is_nested(column.type):
            continue
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            continue
        result[kept] = (
            pa.array(numbers(column)[0], from_pandas=True) if is_numeric(column) else tidy(column)
        )
    return result


def _source(form: Form, table: pa.Table, folder: VideoFolder, files: Any) -> Any:
    if form.source is not None and set(fields(form.source)) <= set(table.column_names):
        return fill(form.source, table)
    if form.source_end is None:
        return None
    names = folder.paths.take(pa.array(files))
    stems = pc.replace_substring_regex(names, r"^.*/", "")
    stems = pc.replace_substring_regex(stems, r"\.[^.]*$", "")
    cut = pc.replace_substring_regex(stems, form.source_end, "", max_replacements=1)
    long_enough = pc.greater_equal(pc.utf8_length(cut), form.source_min)
    return pc.if_else(long_enough, cut, stems)


def _sizes(form: Form, table: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    return {
        ours: numbers(table.column(published))[0]
        for ours, published in form.sizes.items()
        if published in table.column_names
    }


def _nothing_found(
    data_set: DataSet, table: pa.Table, clips: list[str], form: Form, folder: VideoFolder
) -> KinemaError:
    templates = [*clips, *(source for ranges in form.ranges for source in ranges.sources)]
    named = []
    for template in templates:
        if set(fields(template)) <= set(table.column_names) and table.num_rows:
            keys = fill(template, table.slice(0, 1)).to_pylist()
            named += [key for key in keys if key]
    wanted = " or ".join(repr(name) for name in dict.fromkeys(named)) or "no file"
    there = repr(folder.files[0]) if folder.files else "no video at all"
    return KinemaError(
        f"none of the {table.num_rows:,} rows of {data_set.title} has its video here: the first "
        f"means {wanted}, the folder has {there}",
        where=str(folder.folder),
        hint="give the folder that the videos are in as --videos FOLDER",
    )


def given_files(rows: Rows) -> list[Path] | None:
    """The files of a table that names them all by absolute paths; None: it does not."""
    if len(rows.form.clips) != 1 or not rows.table.num_rows:
        return None
    keys = fill(rows.form.clips[0], rows.table)
    absolute = pc.or_(pc.starts_with(keys, "/"), pc.equal(keys, ""))
    if not to_mask(absolute).all():
        return None
    unique = pc.unique(keys).to_pylist()
    return [Path(key) for key in unique if key and os.path.isfile(key) and ".." not in key]
