"""`kinema data check`: decode every clip of a manifest fully and compare it with its row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kinema.data.index import NO_CAPTION
from kinema.data.manifest import Manifest
from kinema.media.errors import MediaError
from kinema.media.pool import DecodePool
from kinema.media.probe import probe
from kinema.media.read import count_by_decoding
from kinema.telemetry.progress import Progress


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that does not hold what it says."""

    row: int
    path: str
    reason: str
    """A short code to count by."""
    message: str


def decode_fully(path: Path | str) -> tuple[int, int, int]:
    """Frames, height and width, from decoding every frame.

    Raises:
        MediaError: any part of the file cannot be decoded.
    """
    info = probe(path)
    if info.kind == "image":
        return 1, info.height, info.width
    return count_by_decoding(path), info.height, info.width


def check_manifest(
    manifest: Manifest, *, workers: int = 4, timeout_s: float = 300.0
) -> list[BadRow]:
    """The bad ones among the rows that are kept, in order.

    A row is bad if its file cannot be decoded to the end within the limit, has another number of
    frames or another size than the row says, or has no caption while other rows have one.

    Args:
        workers: processes that decode.
        timeout_s: limit for one file, in seconds.
    """
    rows = np.flatnonzero(manifest.kept)
    bad: list[BadRow] = []
    captioned = bool((manifest.kept & ~manifest.blank).any())
    columns = [manifest.column(name) for name in ("num_frames", "height", "width")]
    with (
        Progress("checking", total=len(rows), unit="clip") as bar,
        DecodePool(max(1, min(workers, len(rows))), timeout_s) as pool,
    ):
        decoded = pool.map(
            decode_fully, map(int, rows), call=lambda row: (manifest.absolute_path(row),)
        )
        for row, found in decoded:
            fault = _fault(found, (columns[0][row], columns[1][row], columns[2][row]))
            if fault is None and captioned and manifest.blank[row]:
                fault = NO_CAPTION, "has no caption"
            if fault:
                bad.append(BadRow(row, manifest.path(row), *fault))
            bar.advance(note=f"{len(bad)} bad" if bad else "")
    return bad


def mark_bad(manifest: Manifest, bad: list[BadRow]) -> Manifest:
    """The manifest with `dropped_by` set for the bad rows: `check:REASON`."""
    return manifest.with_dropped({item.row: f"check:{item.reason}" for item in bad})


def _fault(
    found: tuple[int, int, int] | MediaError, row: tuple[int, int, int]
) -> tuple[str, str] | None:
    if isinstance(found, MediaError):
        return found.reason, found.what
    if found[0] != row[0]:
        return "frames_differ", f"decodes to {found[0]} frames, its row says {row[0]}"
    if found[1:] != row[1:]:
        return "size_differs", f"is {found[2]}x{found[1]}, its row says {row[2]}x{row[1]}"
    return None
