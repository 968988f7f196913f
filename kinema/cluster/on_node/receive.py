"""Take files from stdin and put them in place together, once all are whole.

Stdin has, for each file, a line of JSON (`name`, `offset`, `size`, `sha256`, `mode`) and its bytes
from `offset` on; an empty line ends it. What arrived before a connection broke stays, hidden, and
the next time goes on there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from typing import Any, BinaryIO

from kinema.cluster.on_node.tree import BLOCK, joined, sha256, sizes_below, staging


def main(path: str, keep: list[str], folder: bool) -> dict[str, Any]:
    """Receive into `path`.

    Args:
        path: final place; `~` is the home folder.
        keep: names of files that are there already and stay as they are.
        folder: whether `path` is a folder; else a single file (its name is "").

    Returns:
        `error`, or nothing when all is in place.
    """
    path = os.path.realpath(os.path.expanduser(path))  # a link stays, what it leads to is new
    hidden = staging(path)
    os.makedirs(hidden, exist_ok=True)
    source = sys.stdin.buffer
    arrived = set()
    while True:
        line = source.readline()
        if not line.endswith(b"\n"):
            return {"error": "the connection broke; the same command goes on from there"}
        if line == b"\n":
            break
        header = json.loads(line)
        error = _file(source, inside(hidden, header["name"] or "file"), header)
        if error:
            return {"error": f"{header['name'] or path}: {error}"}
        arrived.add(header["name"] or "file")
    for name in set(sizes_below(hidden)) - arrived:
        os.unlink(joined(hidden, name))
    if folder:
        _put_folder(hidden, path, keep)
    else:
        os.replace(os.path.join(hidden, "file"), path)
        shutil.rmtree(hidden)
    return {}


def inside(folder: str, name: str) -> str:
    """`name` below `folder`.

    Raises:
        ValueError: it would be elsewhere.
    """
    full = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(name) or not full.startswith(folder + os.sep):
        raise ValueError(f"{name!r} leads out of its folder")
    return full


def _file(source: BinaryIO, place: str, header: dict[str, Any]) -> str:
    """Take one file; returns what went wrong."""
    os.makedirs(os.path.dirname(place), exist_ok=True)
    left = header["size"] - header["offset"]
    try:
        with open(place, "r+b" if header["offset"] else "wb") as file:
            file.truncate(header["offset"])
            file.seek(header["offset"])
            while left:
                block = source.read1(min(BLOCK, left))  # type: ignore[attr-defined]
                if not block:
                    return "the connection broke; the same command goes on from there"
                file.write(block)
                left -= len(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    if sha256(place) != header["sha256"]:
        os.unlink(place)
        return "arrived with other content; the same command sends it again"
    os.chmod(place, header["mode"])
    return ""


def _put_folder(hidden: str, path: str, keep: list[str]) -> None:
    """Swap the whole folder, so that nobody sees old and new files together."""
    for name in keep:
        place = inside(hidden, name)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        try:
            os.link(os.path.join(path, name), place)
        except OSError:  # a file system without links
            shutil.copy2(os.path.join(path, name), place)
    old = f"{hidden}.old"
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, old)
    os.rename(hidden, path)
    shutil.rmtree(old, ignore_errors=True)
