"""Reading and writing files of a run where they are: in a folder or in an fsspec store."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kinema.media.errors import MediaError
from kinema.media.stores import is_url, open_place, read_bytes, upload
from kinema.media.write import atomic_output

__all__ = ["is_url", "local_file", "new_file", "read_bytes"]


@contextmanager
def local_file(path: str) -> Iterator[Path]:
    """The file itself, or a copy of it for the time of the block where it is in a store.

    Raises:
        MediaError: `missing` or `unreadable`, for a file in a store (a local one is not touched).
    """
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="kinema-") as folder:
        copy = Path(folder) / ("file" + os.path.splitext(path)[1])
        try:
            with open_place(path) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except FileNotFoundError:
            raise MediaError("missing", path) from None
        except OSError as error:
            raise MediaError("unreadable", path, error.strerror or str(error)) from None
        yield copy


@contextmanager
def new_file(path: str) -> Iterator[Path]:
    """A temporary local name; when the block succeeds, the file appears at `path` as a whole."""
    if not is_url(path):
        with atomic_output(Path(path)) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="kinema-") as folder:
        made = Path(folder) / ("file" + os.path.splitext(path)[1])
        yield made
        upload(made, path)
