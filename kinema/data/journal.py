"""What an index run has found out so far, so that the next one need not find it out again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kinema.config.errors import KinemaError
from kinema.data.writing import writing

VERSION = {"kinema_index_journal": 1}


class Journal:
    """A file of JSON lines: path, size and modification time of a file, and what was found.

    Lines reach the operating system as they are added, so that a killed run loses at most the one
    it was writing. A run that came to its end says so in a last line; what it refused is tried
    again by the next run, what an interrupted run refused is not.
    """

    def __init__(self, path: Path) -> None:
        """Open or create.

        Raises:
            KinemaError: another run has it open, or it is not a journal.
        """
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line that does not fit on the disk is not tried again on closing.
            self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise KinemaError(
                "another index run is writing this manifest", where=str(path), hint="wait for it"
            ) from None
        self._known: dict[str, dict[str, Any]] = {}
        self._load()

    def _load(self) -> None:
        complete = 0
        with self.path.open("rb") as lines:
            for line in lines:
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    record = None
                if complete == 0 and line.endswith(b"\n") and record != VERSION:
                    raise KinemaError(
                        "is not a journal of this version", where=str(self.path), hint="remove it"
                    )
                if not isinstance(record, dict):
                    break  # the line that a killed run was writing
                complete += len(line)
                if "path" in record:
                    self._known[record["path"]] = record
                elif "finished" in record:
                    self._known = {k: r for k, r in self._known.items() if "refused" not in r}
        self._file.truncate(complete)
        if complete == 0:
            self._add(VERSION)

    def recall(self, path: str, status: os.stat_result | None) -> dict[str, Any] | None:
        """What was found about a file that has not changed since; told once."""
        record = self._known.pop(path, None)
        if (
            record
            and status
            and (record["size"], record["mtime_ns"]) == (status.st_size, status.st_mtime_ns)
        ):
            return record
        return None

    def add(self, path: str, status: os.stat_result | None, **found: Any) -> dict[str, Any]:
        """Keep what was found about a file; returns the record."""
        record = {"path": path, **found}
        if status is not None:  # a file that cannot even be looked at is looked at again
            record |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
            self._add(record)
        return record

    def finish(self) -> None:
        self._add({"finished": True})

    def _add(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with writing(self.path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
