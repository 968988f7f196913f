"""`kinema data index`: a manifest from a folder of videos and images."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kinema.config.errors import KinemaError
from kinema.data.captions import Captions, find_captions
from kinema.data.find_media import Refusal, find_media
from kinema.data.journal import Journal
from kinema.data.manifest import Manifest, Numbers
from kinema.data.tables import check_ending
from kinema.data.writing import writing
from kinema.media.errors import MediaError
from kinema.media.info import MediaInfo
from kinema.media.pool import DecodePool
from kinema.media.probe import probe
from kinema.media.write import atomic_output
from kinema.telemetry.progress import Progress

NO_CAPTION = "no_caption"
"""`dropped_by` of a clip without a caption, where others have one."""

FACTS = ("num_frames", "height", "width", "fps", "file_size")
"""What a row takes from `MediaInfo`."""


@dataclass(frozen=True)
class IndexReport:
    """What an index run did."""

    manifest: Path
    report: Path
    rows: int
    reused: int
    """Files that an earlier, unfinished or older run had looked at."""
    captions: Captions
    without_caption: list[str]
    refused: list[Refusal]

    def reasons(self) -> dict[str, int]:
        """How many files were refused for each reason, most first."""
        return dict(Counter(refusal.reason for refusal in self.refused).most_common())


def index_folder(
    folder: str | Path,
    output: str | Path,
    *,
    captions: str | Path | None = None,
    data_root: str | Path | None = None,
    workers: int = 4,
    timeout_s: float = 20.0,
    report: str | Path | None = None,
) -> IndexReport:
    """Write a manifest of all videos and images below `folder`.

    A run that was interrupted is continued: files that have not changed (size, modification time)
    are not opened again. Paths are written relative to `data_root`, or to the manifest's folder
    where the files are below it, else absolute. Refused files and captions that fit no file go to
    `report` (default: `OUTPUT.report.jsonl`), one JSON object a line.

    Args:
        output: ends in `.csv` or `.parquet`.
        captions: a table of captions, see `find_captions`; None: `.txt` files beside the clips.
        data_root: a folder above `folder`.
        workers: processes that open files.
        timeout_s: limit for one file, in seconds.

    Raises:
        KinemaError: nothing usable was found, or the captions do not fit.
    """
    folder, output = Path(os.path.abspath(folder)), Path(os.path.abspath(output))
    check_ending(output)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise KinemaError(what, where=str(folder))
    base = Path(os.path.abspath(data_root or output.parent))
    if data_root and not folder.is_relative_to(base):
        raise KinemaError(
            f"is not below the data root {base}", where=str(folder), hint="give a folder above it"
        )
    if captions and Path(captions).resolve() == output.resolve():
        raise KinemaError(
            "the manifest would replace the captions it is made of",
            where=str(output),
            hint="give -o another name",
        )
    files, refused = find_media(folder)
    texts = find_captions(folder, files, Path(captions) if captions else None, base)
    report_path = Path(report or f"{output}.report.jsonl")

    with Journal(Path(f"{output}.journal.jsonl")) as journal:
        facts, unusable, reused = probe_all(folder, files, journal, workers, timeout_s)
        refused = sorted([*refused, *unusable], key=lambda refusal: refusal.path)
        usable = np.flatnonzero(~np.isnan(facts[:, 0]))
        rows = [files[number] for number in usable]
        without = [file for file in rows if not texts.texts.get(file)]
        _write_report(report_path, refused, texts, without)
        result = IndexReport(output, report_path, len(rows), reused, texts, without, refused)
        if not rows:
            raise _nothing_usable(folder, result)
        _manifest(folder, base, rows, facts[usable], texts).write(output, data_root=base)
        journal.finish()
    return result


def probe_all(
    folder: Path, files: list[str], journal: Journal, workers: int, timeout_s: float
) -> tuple[Numbers, list[Refusal], int]:
    """Look into every file that the journal does not know.

    Returns:
        `FACTS` of each file `[N, 5]`, NaN where it was refused; the refusals; how many files the
        journal knew.
    """
    facts = np.full((len(files), len(FACTS)), np.nan)
    refused: list[Refusal] = []

    def keep(number: int, record: dict[str, Any]) -> None:
        if "refused" in record:
            refused.append(Refusal(files[number], *record["refused"]))
        else:
            facts[number] = [record[name] for name in FACTS]

    new: list[int] = []
    for number, file in enumerate(files):
        record = journal.recall(file, _status(folder / file))
        if record:
            keep(number, record)
        else:
            new.append(number)

    statuses: dict[int, os.stat_result | None] = {}

    def call(number: int) -> tuple[Path]:
        # Before the file is opened: what changes while it is read is read again next time.
        statuses[number] = _status(folder / files[number])
        return (folder / files[number],)

    reused = len(files) - len(new)
    with (
        Progress("indexing", total=len(files), unit="file", done=reused) as bar,
        DecodePool(max(1, min(workers, len(new))), timeout_s) as pool,
    ):
        for number, info in pool.map(probe, new, call=call, ordered=False):
            keep(number, journal.add(files[number], statuses.pop(number), **_found(info)))
            bar.advance(note=files[number])
    return facts, refused, reused


def _status(path: Path) -> os.stat_result | None:
    """None if there is nothing to see; opening the file will say why."""
    try:
        return os.stat(path)
    except OSError:
        return None


def _found(info: MediaInfo | MediaError) -> dict[str, Any]:
    if isinstance(info, MediaError):
        return {"refused": [info.reason, info.what]}
    if info.num_frames > 1 and not info.fps > 0:
        return {"refused": ["no_frame_rate", "the video does not say its frame rate"]}
    return {name: getattr(info, name) for name in FACTS}


def _manifest(
    folder: Path, base: Path, rows: list[str], facts: Numbers, captions: Captions
) -> Manifest:
    prefix = folder.relative_to(base) if folder.is_relative_to(base) else folder
    texts = [captions.texts.get(row, "") for row in rows]
    columns: dict[str, Any] = {"path": [str(prefix / row) for row in rows], "text": texts}
    columns |= {name: facts[:, number] for number, name in enumerate(FACTS)}
    if any(texts):
        columns["dropped_by"] = ["" if text else NO_CAPTION for text in texts]
    return Manifest.from_columns(columns, base)


def _write_report(
    path: Path, refused: list[Refusal], captions: Captions, without: list[str]
) -> None:
    lines = [*refused, *captions.unused]
    if captions.source != "none":
        lines += [Refusal(file, NO_CAPTION, f"{captions.source} has none") for file in without]
    with (
        writing(path),
        atomic_output(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for line in lines:
            file.write(json.dumps(asdict(line), ensure_ascii=False) + "\n")


def _nothing_usable(folder: Path, result: IndexReport) -> KinemaError:
    if not result.refused:
        return KinemaError("there is no video or image in it", where=str(folder))
    counts = ", ".join(f"{reason} {count}" for reason, count in result.reasons().items())
    return KinemaError(
        f"none of its {len(result.refused)} files can be used ({counts})",
        where=str(folder),
        hint=f"{result.report} has the reason for each file",
    )
