"""Whether nodes see the same disk: one makes a file, the others look for it."""

from __future__ import annotations

import contextlib
import os
from typing import Any


def main(folder: str, disk: str, name: str, step: str) -> dict[str, Any]:
    """Make, look or remove.

    Args:
        folder: where training is to run.
        disk: where it will write, relative to `folder` if not absolute; need not exist.
        name: of the file; unlike any other.
        step: `make`, `look` or `remove`.

    Returns:
        `seen`: whether the file is there afterwards.
    """
    there = os.path.join(folder, disk)
    while not os.path.isdir(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    path = os.path.join(there, name)
    if step == "make":
        with open(path, "x"):
            pass
    elif step == "remove":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return {"seen": os.path.exists(path)}
