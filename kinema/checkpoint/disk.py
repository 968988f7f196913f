"""Files that survive a crash, and a full disk told plainly."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kinema.checkpoint.errors import CheckpointError

FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
FULL_TEXTS = tuple(os.strerror(code) for code in sorted(FULL))
BLOCK = 16 * 2**20


@dataclass(frozen=True)
class FileRecord:
    """What a file held when it was written."""

    size: int
    """Bytes."""
    sha256: str
    rank: int = 0
    """Of the process that wrote it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, flushed and renamed to it on success, else removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> FileRecord:
    """Write a small file completely or not at all."""
    data = text.encode()
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def read_record(path: Path) -> FileRecord:
    """Size and hash of a file as it is now."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


@contextmanager
def full_disk_explained(where: Path, *, needs: int | None = None) -> Iterator[None]:
    """Turn any way in which "no space left" comes up into one CheckpointError.

    Args:
        needs: bytes that are written in all, for the message.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        free = free_bytes(where)
        room = f"{gigabytes(free)} free"
        if needs is not None:
            room = f"needs {gigabytes(needs)}, {room}"
        cause = f"the disk is full ({room})"
        if needs is not None and needs < free:
            cause = f"a quota or a limit on file size, as the disk has room ({room})"
        raise CheckpointError(
            f"could not be written: {cause}; what was saved before is untouched",
            where=str(where),
            hint="free space there, or set keep_checkpoints, then start again with --load",
        ) from error


def free_bytes(path: Path) -> int:
    """What can still be written where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gigabytes(count: int) -> str:
    """A size as people read it: `12.3 GB`, and `4.1 MB` below a tenth of one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def is_full_disk(error: BaseException | None) -> bool:
    """Whether this error, or one that it came from, is about space or quota."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        # Libraries rewrap the error and keep only its text.
        if any(text in str(error) for text in FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False
