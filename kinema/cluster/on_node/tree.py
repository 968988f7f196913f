"""Which files are under a path here, with sizes and hashes; also what has arrived in part."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

STAGING = ".kinema-arriving-"
"""Beginning of the hidden folder, beside the final place, that files arrive in."""
BLOCK = 1 << 22


def main(path: str, hash_sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """Look at a file or folder.

    Args:
        path: `~` is the home folder of the node's user.
        hash_sizes: names with the sizes that they have elsewhere: only equal ones are hashed.

    Returns:
        `files`: name below `path` ("" for a file itself) -> [size, SHA-256 or None];
        `arriving`: name -> bytes that have arrived; `folder`: whether `path` is one.
    """
    path = os.path.realpath(os.path.expanduser(path))
    sizes = sizes_below(path)
    wanted = [n for n in sizes if hash_sizes is None or hash_sizes.get(n) == sizes[n]]
    with ThreadPoolExecutor(8) as pool:
        jobs = {name: pool.submit(sha256, joined(path, name)) for name in wanted}
    hashes = {name: job.result() for name, job in jobs.items()}
    return {
        "files": {name: [size, hashes.get(name)] for name, size in sizes.items()},
        "arriving": sizes_below(staging(path)),
        "folder": os.path.isdir(path),
    }


def staging(path: str) -> str:
    """The hidden folder for what arrives at `path`."""
    path = path.rstrip("/")
    return os.path.join(os.path.dirname(path), STAGING + os.path.basename(path))


def joined(path: str, name: str) -> str:
    """The file `name` below `path`; of a single file the name is empty."""
    return os.path.join(path, name) if name else path


def sizes_below(path: str) -> dict[str, int]:
    """Regular files below a folder, by name; a file by itself has the name "".

    Links are followed, because what is linked is part of the folder for whoever reads it.
    """
    if os.path.isfile(path):
        return {"": os.path.getsize(path)}
    sizes = {}
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = [n for n in folders if n != "__pycache__" and not n.startswith(STAGING)]
        here = os.path.realpath(folder)
        # A link to where it is itself would have no end.
        folders[:] = [n for n in folders if not _holds(os.path.join(folder, n), here)]
        for name in names:
            full = os.path.join(folder, name)
            if os.path.isfile(full):
                sizes[os.path.relpath(full, path)] = os.path.getsize(full)
    return sizes


def _holds(link: str, folder: str) -> bool:
    """Whether a link leads to a folder or to what that is in."""
    target = os.path.realpath(link)
    return os.path.islink(link) and (folder + os.sep).startswith(target.rstrip(os.sep) + os.sep)


def sha256(path: str) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
