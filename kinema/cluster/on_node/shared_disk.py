"""Whether nodes see the same disk: each makes a file, then all look whose files they see."""

from __future__ import annotations

import contextlib
import os
from typing import Any


def main(path: str, name: str, host: str, others: list[str], step: str) -> dict[str, Any]:
    """Make, look or remove.

    Args:
        path: folder; the nearest one above it that exists is taken. `~` is the home folder.
        name: that files begin with; unlike any other.
        host, others: this node, and all that were asked.
        step: `make`, `look` or `remove`.

    Returns:
        `sees`: nodes whose files are there, in the order of `others`.
    """
    there = os.path.abspath(os.path.expanduser(path))
    while not os.path.isdir(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    own = os.path.join(there, f"{name}-{host}")
    sees: list[str] = []
    with contextlib.suppress(OSError):  # what may not be written to is shared with nobody
        if step == "make":
            with open(own, "x"):
                pass
        elif step == "remove":
            os.unlink(own)
        else:
            names = set(os.listdir(there))  # a listing is fresh where a network disk remembers
            sees = [h for h in others if f"{name}-{h}" in names]
    return {"sees": sees}
