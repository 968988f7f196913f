"""What must be the same on all nodes: software, and given files. Runs under the training Python."""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from typing import Any

from kinema.cluster.on_node import inspect_node

CHUNK = 1 << 22


def main(folder: str, files: list[str]) -> dict[str, Any]:
    """Look.

    Args:
        folder: where training runs.
        files: of weights; relative to `folder` if not absolute. Each is read whole.
    """
    node = inspect_node.main(folder, [], ".")
    return {
        "python": node["python"],
        **node["versions"],
        "nccl": _nccl(),
        "code": node["code"],
        "files": {name: _fingerprint(os.path.join(folder, name)) for name in files},
    }


def _nccl() -> str | None:
    """Of the package that torch's wheel brings, whichever CUDA it is for."""
    for package in metadata.distributions():
        name = (package.metadata["Name"] or "").lower()
        if name.startswith("nvidia-nccl-cu"):
            return str(package.version)
    return None


def _fingerprint(path: str) -> dict[str, Any]:
    """Size and hash; of a folder, over its files and their names."""
    digest, size = hashlib.sha256(), 0
    try:
        if os.path.isdir(path):
            names = [
                os.path.relpath(os.path.join(folder, name), path)
                for folder, _, found in os.walk(path)
                for name in found
            ]
            for name in sorted(names):
                digest.update(name.encode() + b"\0")
                size += _add(digest, os.path.join(path, name))
        else:
            size = _add(digest, path)
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {"size": size, "sha256": digest.hexdigest()}


def _add(digest: Any, path: str) -> int:
    size = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size
