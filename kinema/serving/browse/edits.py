"""Marks and edited captions, kept beside the manifest line by line.

`MANIFEST.edits.jsonl` has one line per change, the last one counts. A line is on the disk before
the page says that it is saved; a last line that a crash cut off is passed over.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kinema.data.writing import writing

MAX_TEXT = 100_000
"""Characters of a caption."""


class Edits:
    """What was changed on the page.

    A change names its clip by path as well as by row: when the manifest was written anew with
    other rows, it follows the path (where that is there once), and is otherwise left out.

    Attributes:
        texts: row -> caption as edited.
        marked: rows that are marked.
        lost: changes whose clip is not in the manifest any more.
        revision: grows with each change.
    """

    def __init__(self, file: Path, path_of: Callable[[int], str], rows: int) -> None:
        """Read what is there.

        Args:
            file: need not exist; it is made with the first change.
            path_of: the path of a row, as the manifest writes it.
            rows: rows of the manifest.
        """
        self.file = file
        self.texts: dict[int, str] = {}
        self.marked: set[int] = set()
        self.lost = 0
        self.revision = 0
        self._path_of = path_of
        self._rows = rows
        self._lock = threading.Lock()
        self._places: dict[str, int] | None = None
        self._read()

    def set_text(self, row: int, text: str | None) -> None:
        """Edit a caption; None takes the edit back."""
        self._add({"row": row, "path": self._path_of(row), "text": text})

    def set_marks(self, rows: list[int], marked: bool) -> None:
        """Mark clips, or take the marks off; one change of the file for all."""
        lines = [{"row": row, "path": self._path_of(row), "mark": marked} for row in rows]
        self._add(*lines)

    def _add(self, *lines: dict[str, Any]) -> None:
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        with self._lock, writing(self.file):
            with self.file.open("ab") as file:
                if file.tell() and not _ends_with_newline(self.file):
                    data = b"\n" + data  # after a line that a crash cut off
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            for line in lines:
                self._apply(line["row"], line)
            self.revision += 1

    def _apply(self, row: int, line: dict[str, Any]) -> None:
        if "text" in line:
            if line["text"] is None:
                self.texts.pop(row, None)
            else:
                self.texts[row] = str(line["text"])
        if "mark" in line:
            (self.marked.add if line["mark"] else self.marked.discard)(row)

    def _read(self) -> None:
        if not self.file.is_file():
            return
        for raw in self.file.read_bytes().split(b"\n"):
            try:
                line = json.loads(raw)
                row, path = int(line["row"]), str(line["path"])
            except (ValueError, KeyError, TypeError):
                self.lost += bool(raw.strip())
                continue
            found = self._find(row, path)
            if found is None:
                self.lost += 1
            else:
                self._apply(found, line)

    def _find(self, row: int, path: str) -> int | None:
        if 0 <= row < self._rows and self._path_of(row) == path:
            return row
        if self._places is None:
            places: dict[str, int] = {}
            for place in range(self._rows):
                name = self._path_of(place)
                places[name] = -1 if name in places else place
            self._places = places
        place = self._places.get(path, -1)
        return place if place >= 0 else None


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
