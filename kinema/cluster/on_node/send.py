"""Write files to stdout: the bytes of each from an offset on, one after the other."""

from __future__ import annotations

import os
import sys

from kinema.cluster.on_node.tree import BLOCK


def main(folder: str, files: list[list[object]]) -> None:
    """Send.

    Args:
        folder: `~` is the home folder.
        files: of each its name below `folder`, the offset, and the size it is known to have.
    """
    out = sys.stdout.buffer
    for name, offset, size in files:
        left = int(str(size)) - int(str(offset))
        with open(os.path.join(os.path.expanduser(folder), str(name)), "rb") as file:
            file.seek(int(str(offset)))
            while left:
                block = file.read(min(BLOCK, left))
                if not block:
                    raise SystemExit(f"{name} is shorter than it was")
                out.write(block)
                left -= len(block)
    out.flush()
