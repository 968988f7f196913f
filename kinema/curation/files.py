"""New files of a run, in a folder or in a store: there as a whole, or not at all."""

from __future__ import annotations

import os
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kinema.config.errors import KinemaError
from kinema.media.stores import filesystem, is_url, store_errors, upload
from kinema.media.write import atomic_output


@contextmanager
def new_file(path: str) -> Iterator[Path]:
    """A temporary name on this disk; when the block succeeds, the file appears at `path`.

    Raises:
        OSError: it cannot be written there; of a store, KinemaError.
    """
    if not is_url(path):
        with atomic_output(Path(path)) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="kinema-") as folder:
        made = Path(folder) / ("file" + os.path.splitext(path)[1])
        yield made
        put(made, path)


def put(file: Path, url: str) -> None:
    """Copy a finished file to a store.

    Raises:
        KinemaError: it cannot be written there.
    """
    try:
        upload(file, url)
    except OSError as error:
        raise KinemaError(
            f"cannot be written: {error.strerror or error}",
            where=url,
            hint="check that the bucket is there, and who may write to it; the same command goes "
            "on where it stopped",
        ) from None


def remove_leftovers(*folders: str) -> None:
    """Remove what killed workers were writing below the folders of a run (nobody else writes there
    while it is locked); stores have no such files."""
    for folder in folders:
        if not is_url(folder):
            for file in Path(folder).glob("??/.*.tmp.*"):
                file.unlink(missing_ok=True)


def seen_from_here(path: str) -> str:
    """A path as messages show it: from the folder that the person is in, where that is shorter."""
    if not path.startswith("/"):
        return path
    seen = os.path.relpath(path)
    return seen if len(seen) < len(path) else path


class Present:
    """Says which files are there. Each folder is listed once: of a million files on a shared disk
    or in a store that takes seconds, one by one many minutes."""

    def __init__(self) -> None:
        self._listed: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = posixpath.split(path)
        if folder not in self._listed:
            self._listed[folder] = _names_in(folder)
        return name in self._listed[folder]


def _names_in(folder: str) -> set[str]:
    if not is_url(folder):
        try:
            return set(os.listdir(folder))
        except OSError:
            return set()
    system, below = filesystem(folder)
    with store_errors(folder):
        system.invalidate_cache(below)
        names = system.find(below, maxdepth=1) if system.exists(below) else []
    return {posixpath.basename(name) for name in names}
