"""Things that go wrong in a decode worker. Imported there, so: no torch, no pytest."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from kinema.media.errors import MediaError

_kept: list[bytearray] = []


def sleep(path: Path, seconds: float) -> str:
    time.sleep(seconds)
    return path.name


def environment(path: Path, name: str, together: Path) -> tuple[int, str | None]:
    """This process's id and a variable of it; comes back when two processes have been here."""
    with together.open("a") as file:
        file.write(f"{os.getpid()}\n")
    deadline = time.monotonic() + 30
    while len(set(together.read_text().split())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return os.getpid(), os.environ.get(name)


def say_and_wait(path: Path) -> None:
    """Write the worker's process id to the file, and never come back."""
    path.write_text(str(os.getpid()))
    time.sleep(10**6)


def spin(path: Path) -> None:
    while True:
        pass


def hold_the_interpreter(path: Path) -> None:
    """One call into C that does not let go of the lock, so that no thread of the worker runs."""
    sum(range(10**18))


def read_to_the_end(path: Path) -> int:
    """What a decoder would do without looking at what it opens."""
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 16):
            total += len(chunk)
    return total


def die(path: Path, sign: int) -> None:
    os.kill(os.getpid(), sign)
    time.sleep(60)


def leave(path: Path, code: int) -> None:
    os._exit(code)


def keep(path: Path, nbytes: int) -> int:
    """Leak memory; the worker's process id."""
    _kept.append(bytearray(os.urandom(1)) * nbytes)
    return os.getpid()


def pid(path: Path) -> int:
    return os.getpid()


def arrays(path: Path) -> dict[str, object]:
    big = np.arange(3_000_000, dtype=np.float32).reshape(3, 1000, 1000)
    return {
        "big": big,
        "small": np.uint8([1, 2, 3]),
        "turned": big.swapaxes(0, 1)[:2],
        "name": path,
    }


def out_of_memory(path: Path) -> None:
    raise MemoryError


def refuse(path: Path) -> None:
    raise MediaError("corrupt", path, "said so")


def forbidden(path: Path) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def mistake(path: Path) -> None:
    raise TypeError("a mistake in our code")


def unpicklable(path: Path) -> object:
    return lambda: path


def modules(path: Path) -> bool:
    import sys

    return "torch" in sys.modules
