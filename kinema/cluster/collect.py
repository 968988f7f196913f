"""Output of all ranks of all hosts: rank 0 on the terminal, everything in files."""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
from pathlib import Path
from typing import BinaryIO

RANK_LINE = re.compile(rb"\[rank(\d+)\]: ?")
TAIL = 15
"""Lines of a failed rank that are shown."""


class Collector:
    """Sorts the lines of every host into `folder/HOST/rankN.log` and `torchrun.log`.

    A disk that fills up on the launching machine stops the logs, never the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, BinaryIO | None] = {}
        self._tails: dict[Path, deque[str]] = {}
        self._lock = threading.Lock()

    def line(self, host: str, line: bytes) -> None:
        """Take one line, with its end."""
        match = RANK_LINE.match(line)
        if match:
            path, line = self.path(host, int(match[1])), line[match.end() :]
            if int(match[1]) == 0:
                self._show(line)
        else:
            path = self.path(host, None)
        with self._lock:
            if path not in self._tails:
                self._tails[path] = deque(maxlen=400)
                self._files[path] = self._open(path)
            self._tails[path].append(line.decode(errors="replace").rstrip("\n"))
            file = self._files[path]
            if file is not None:
                try:
                    file.write(line)
                    file.flush()
                except OSError as error:
                    self._files[path] = None
                    self._complain(path, error)

    def path(self, host: str, rank: int | None) -> Path:
        """The log of a rank, or of the host's torchrun."""
        return self.folder / host / ("torchrun.log" if rank is None else f"rank{rank}.log")

    def tail(self, host: str, rank: int | None, lines: int = TAIL) -> list[str]:
        """The last lines that were said."""
        with self._lock:
            kept = [t for t in self._tails.get(self.path(host, rank), ()) if t.strip()]
        return kept[-lines:]

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                if file is not None:
                    file.close()
            self._files = dict.fromkeys(self._files)

    def _open(self, path: Path) -> BinaryIO | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("ab")
        except OSError as error:
            self._complain(path, error)
            return None

    def _complain(self, path: Path, error: OSError) -> None:
        sys.stderr.write(f"{path}: {error.strerror}; this log ends here, the run goes on\n")

    def _show(self, line: bytes) -> None:
        try:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        except (OSError, ValueError):
            pass  # the terminal went away; the files have it
