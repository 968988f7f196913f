"""New files of a run, in a folder or in a store: there as a whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kinema.media.stores import is_url, upload
from kinema.media.write import atomic_output


@contextmanager
def new_file(path: str) -> Iterator[Path]:
    """A temporary name on this disk; when the block succeeds, the file appears at `path`.

    Raises:
        OSError, StoreError: it cannot be written there.
    """
    if not is_url(path):
        with atomic_output(Path(path)) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="kinema-") as folder:
        made = Path(folder) / ("file" + os.path.splitext(path)[1])
        yield made
        upload(made, path)
