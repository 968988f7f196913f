"""`kinema data import`: from a data set as it was published to a manifest, or to a cut list."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.config.errors import KinemaError
from kinema.curation.importers.catalog import GUESSED, data_set
from kinema.curation.importers.columns import join, to_mask
from kinema.curation.importers.cut_list import cut_table, write_cut_list
from kinema.curation.importers.dataset import SIZES, DataSet, Request, Rows
from kinema.curation.importers.findings import Findings
from kinema.curation.importers.resolve import Kind, Resolved, given_files, resolve
from kinema.curation.importers.rows import read_rows, videos_folder
from kinema.curation.importers.video_folder import VideoFolder
from kinema.data.index import FACTS, NO_CAPTION, probe_all
from kinema.data.journal import Journal
from kinema.data.manifest import Manifest
from kinema.data.tables import check_ending


@dataclass(frozen=True)
class ImportReport:
    """What an import did."""

    data_set: DataSet
    kind: Kind
    output: Path
    report: Path
    table_rows: int
    """Rows of the sources."""
    rows: int
    """Clips in the manifest or the cut list."""
    videos: int
    """Files they are of."""
    reused: int
    """Files that an earlier run had looked at."""
    text_column: str | None
    with_caption: int
    columns: tuple[str, ...]
    findings: Findings
    notes: tuple[str, ...] = field(default=())


def import_data(
    name: str,
    request: Request,
    output: str | Path,
    *,
    prefer: Kind | None = None,
    trust_table: bool = False,
    data_root: str | Path | None = None,
    workers: int = 4,
    timeout_s: float = 20.0,
    report: str | Path | None = None,
) -> ImportReport:
    """Write the manifest of a data set's clips; of a list of parts of videos, a cut list.

    Sizes, rates and numbers of frames are probed from the files; what was found is kept in
    `OUTPUT.journal.jsonl`, so that an interrupted run goes on. Rows without a usable video go to
    `report` (default: `OUTPUT.report.jsonl`).

    Args:
        name: of the data set (`catalog.DATA_SETS`).
        output: ends in `.parquet`, or in `.csv` for a manifest.
        prefer: see `resolve`.
        trust_table: take sizes from the table where it has them all, and open no file.
        data_root: the folder that the manifest's paths are relative to.

    Raises:
        KinemaError: no such data set, a source of another one, no row with a video.
    """
    entry = data_set(name)
    if not request.sources:
        raise KinemaError("SOURCE is missing", where=name, hint=f"SOURCE is {entry.line}")
    output = Path(os.path.abspath(output))
    check_ending(output)
    _refuse_to_replace(request, output)
    base = Path(os.path.abspath(data_root or output.parent))
    findings = Findings()
    rows = read_rows(entry, request, findings)
    folder = _folder(entry, rows, request)
    resolved = resolve(entry, rows, folder, findings, prefer)
    findings.add_refusals(folder.refused)
    findings.add_all("no_row", folder.unused(resolved.files), "no row names it")
    report_path = Path(report or f"{output}.report.jsonl")
    reused = 0
    if resolved.kind == "cuts":
        kept = np.arange(len(resolved.files))
        _write_cuts(resolved, output, base)
    elif trust_table:
        kept, facts = _trusted(entry, rows, resolved, findings)
        write_clips(resolved, kept, facts, output, base, findings)
    else:
        with Journal(Path(f"{output}.journal.jsonl")) as journal:
            kept, facts, reused = _probed(resolved, journal, workers, timeout_s, findings)
            findings.write(report_path)
            _check_any(kept, findings, report_path, folder)
            write_clips(resolved, kept, facts, output, base, findings)
            journal.finish()
    findings.write(report_path)
    _check_any(kept, findings, report_path, folder)
    captions = to_mask(pc.not_equal(resolved.text, ""))[kept]
    return ImportReport(
        entry,
        resolved.kind,
        output,
        report_path,
        rows.table.num_rows,
        len(kept),
        len(np.unique(resolved.files[kept])),
        reused,
        rows.text,
        int(captions.sum()),
        tuple(n for n in resolved.columns if resolved.kind == "clips" or n != "source"),
        findings,
        resolved.notes,
    )


def _refuse_to_replace(request: Request, output: Path) -> None:
    for source in request.sources:
        if source.resolve() == output.resolve():
            raise KinemaError(
                "the manifest would replace the table it is made of",
                where=str(output),
                hint="give -o another name",
            )


def _folder(entry: DataSet, rows: Rows, request: Request) -> VideoFolder:
    if entry.name in GUESSED and request.videos is None and request.extract is None:
        files = given_files(rows)
        if files is not None:
            return VideoFolder.of(files)
    return VideoFolder(Path(os.path.abspath(videos_folder(request))))


def _check_any(kept: Any, findings: Findings, report: Path, folder: VideoFolder) -> None:
    if len(kept):
        return
    counts = ", ".join(f"{reason} {count}" for reason, count in findings.counts().items())
    raise KinemaError(
        f"no clip is left ({counts})",
        where=str(folder.folder),
        hint=f"{report} has the reason for each row",
    )


def _trusted(
    entry: DataSet, rows: Rows, resolved: Resolved, findings: Findings
) -> tuple[Any, np.ndarray[Any, Any]]:
    missing = [name for name in SIZES if name not in resolved.sizes]
    if missing:
        raise KinemaError(
            f"the table of {entry.title} does not say {', '.join(missing)}",
            where="--trust-table",
            hint="leave it out: the files are looked into",
        )
    facts = np.stack([resolved.sizes[name] for name in SIZES], axis=1)
    whole = facts[:, :3]
    with np.errstate(invalid="ignore"):
        good = (whole >= 1).all(1) & (whole == np.floor(whole)).all(1)
        good &= (facts[:, 3] > 0) | (facts[:, 0] == 1)
    lost = np.flatnonzero(~good)
    names = resolved.folder.paths.take(pa.array(resolved.files[lost])).to_pylist()
    findings.add_all("no_size", names, "the table lacks its frames, size or rate")
    kept = np.flatnonzero(good)
    bytes_ = [
        _size(resolved.folder.folder / resolved.folder.files[number])
        for number in resolved.files[kept]
    ]
    return kept, np.concatenate([facts[kept], np.array(bytes_, float)[:, None]], axis=1)


def _size(path: Path) -> float:
    try:
        return float(os.stat(path).st_size)
    except OSError:
        return float("nan")


def _probed(
    resolved: Resolved, journal: Journal, workers: int, timeout_s: float, findings: Findings
) -> tuple[Any, np.ndarray[Any, Any], int]:
    files = [resolved.folder.files[number] for number in resolved.files]
    facts, refused, reused = probe_all(resolved.folder.folder, files, journal, workers, timeout_s)
    findings.add_refusals(sorted(refused, key=lambda refusal: refusal.path))
    kept = np.flatnonzero(~np.isnan(facts[:, 0]))
    return kept, facts[kept], reused


def _relative(paths: pa.Array, folder: Path, base: Path) -> Any:
    """Paths below `folder` as a manifest writes them: relative to `base` if they are below it."""
    prefix = f"{str(folder).rstrip('/')}/"
    if folder.is_relative_to(base):
        below = folder.relative_to(base)
        prefix = "" if str(below) == "." else f"{below}/"
        return join(prefix, paths)
    paths = join(prefix, paths)
    if not base.is_relative_to(folder):
        return paths
    inside = f"{str(base).rstrip('/')}/"
    return pc.if_else(
        pc.starts_with(paths, inside), pc.utf8_slice_codeunits(paths, len(inside)), paths
    )


def write_clips(
    resolved: Resolved,
    kept: Any,
    facts: np.ndarray[Any, Any],
    output: Path,
    base: Path,
    findings: Findings,
) -> None:
    if not len(kept):
        return
    rows = pa.array(kept)
    paths = resolved.folder.paths.take(pa.array(resolved.files[kept]))
    text = resolved.text.take(rows)
    columns: dict[str, Any] = {
        "path": _relative(paths, resolved.folder.folder, base),
        "text": text,
    }
    columns |= {name: facts[:, number] for number, name in enumerate(FACTS)}
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = facts[:, 0] / facts[:, 3]
    columns["duration"] = np.where(np.isfinite(seconds), seconds, np.nan)
    columns |= {name: column.take(rows) for name, column in resolved.columns.items()}
    blank = to_mask(pc.equal(text, ""))
    if blank.any() and not blank.all():
        columns["dropped_by"] = np.where(blank, NO_CAPTION, "")
        names = paths.take(pa.array(np.flatnonzero(blank))).to_pylist()
        findings.add_all(NO_CAPTION, names, "its row has no caption")
    Manifest.from_columns(columns, base).write(output, data_root=base)


def _write_cuts(resolved: Resolved, output: Path, base: Path) -> None:
    assert resolved.start_s is not None
    assert resolved.end_s is not None
    paths = resolved.folder.paths.take(pa.array(resolved.files))
    start = np.where(np.isnan(resolved.end_s), np.nan, resolved.start_s)
    columns = {name: column for name, column in resolved.columns.items() if name != "source"}
    table = cut_table(
        _relative(paths, resolved.folder.folder, base),
        start,
        resolved.end_s,
        resolved.text,
        columns,
    )
    write_cut_list(output, table, data_root=base)
