"""Files that cannot be written, told to the person: which, why, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from kinema.config.errors import KinemaError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn the system's refusal to write `path` into a message that names it.

    Raises:
        KinemaError: the disk is full, the folder may not be written, ...
    """
    try:
        yield
    except OSError as error:
        full = error.errno in NO_SPACE
        raise KinemaError(
            f"cannot be written: {os.strerror(error.errno) if error.errno else error}",
            where=str(path),
            hint="free some space, then run the same command again"
            if full
            else "check the folder and its permissions",
        ) from None
