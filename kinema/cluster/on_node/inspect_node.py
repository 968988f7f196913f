"""What a node has: versions, code, GPUs, cores, files, room on its disk."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import sys
from importlib import metadata
from typing import Any

PACKAGES = ("kinema", "torch")


def main(folder: str, paths: list[str], disk: str) -> dict[str, Any]:
    """Look; nothing is changed. Runs under the interpreter that is to train.

    Args:
        folder: where training is to run.
        paths: files and folders that it will read.
        disk: where it will write, relative to `folder` if not absolute.
    """
    there = os.path.join(folder, disk)
    while not os.path.exists(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    return {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "code": _code(),
        "gpus": _gpus(),
        "cores": len(os.sched_getaffinity(0)),
        "folder": os.path.isdir(folder),
        "missing": [p for p in paths if not os.path.exists(os.path.join(folder, p))],
        "writable": os.access(there, os.W_OK),
        "free": shutil.disk_usage(there).free,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _code() -> str | None:
    """Hash of the installed Kinema's files: two trees of one version may still differ."""
    for finder in sys.meta_path:
        if type(finder).__name__ == "Sent":  # how this module came here
            continue
        find = getattr(finder, "find_spec", None)
        spec = find("kinema", None) if find else None
        if spec is not None and spec.origin and spec.origin != "built-in":
            return _hash(os.path.dirname(spec.origin))
    return None


def _hash(package: str) -> str:
    digest = hashlib.sha256()
    files = []
    for folder, folders, names in os.walk(package):
        folders[:] = [name for name in folders if name != "__pycache__"]
        files += [os.path.join(folder, n) for n in names if n.endswith((".py", ".yaml"))]
    for path in sorted(files):
        with open(path, "rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
        digest.update(f"{os.path.relpath(path, package)} {content}\n".encode())
    return digest.hexdigest()[:12]


def _gpus() -> int:
    try:
        return len([n for n in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", n)])
    except OSError:
        return 0
