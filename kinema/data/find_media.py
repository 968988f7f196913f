"""The videos and images below a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kinema.media.info import IMAGE_SUFFIXES, VIDEO_SUFFIXES

SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file, folder or caption that did not become a row, and why."""

    path: str
    reason: str
    """A short code to count by."""
    message: str


def find_media(folder: Path) -> tuple[list[str], list[Refusal]]:
    """Everything below `folder` that is named like a video or an image, sorted.

    Names decide, so that a folder or a pipe called `x.mp4` is looked at (and refused) rather than
    passed over. Links are followed, each folder once, so that loops end. Hidden names (`.x`) are
    left out: system files and unfinished writes.

    Returns:
        Paths relative to `folder`, and what below it could not be listed or named.

    Raises:
        OSError: `folder` itself cannot be listed.
    """
    os.listdir(folder)
    found: list[str] = []
    refused: list[Refusal] = []

    def unlistable(error: OSError) -> None:
        name = os.path.relpath(error.filename, folder)
        refused.append(Refusal(name, "unlistable", f"folder cannot be listed: {error.strerror}"))

    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, onerror=unlistable, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(here, folder)
        prefix = "" if below == os.curdir else f"{below}/"
        for name in (*folders, *files):
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            path = f"{prefix}{name}"
            try:
                path.encode()
            except UnicodeEncodeError:
                shown = path.encode("utf-8", "backslashreplace").decode()
                refused.append(Refusal(shown, "bad_name", "the name is not valid UTF-8"))
            else:
                found.append(path)
    return sorted(found), refused
