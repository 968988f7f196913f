"""What an import left out, counted and named: the lines of OUTPUT.report.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinema.data.find_media import Refusal
from kinema.data.writing import writing
from kinema.media.write import atomic_output

MEANING = {
    "no_file": "rows whose video is not in the folder",
    "no_row": "videos that no row names",
    "no_name": "rows that name no video",
    "unsafe_path": "rows whose path leaves the folder (`..`)",
    "ambiguous": "rows whose name fits several videos, or whose video several rows could mean",
    "repeated": "rows for a video, or a part of one, that an earlier row has",
    "bad_time": "rows whose times are missing, not times, or end before they start",
    "bad_row": "rows that could not be read",
    "bad_number": "values that are no numbers, left empty",
    "no_size": "rows whose size or rate is missing in the table",
    "no_caption": "clips without a caption (kept out of training)",
    "unsafe_member": "members of archives that are links or leave the folder, not extracted",
    "truncated": "archives or videos that are cut off",
    "too_large": "captions or JSON that are too large to be that",
}
"""Reason -> what its lines are."""
IN_PASSING = frozenset({"no_row", "no_caption", "bad_number"})
"""Reasons that cost no row."""


@dataclass
class Findings:
    """Lines for the report, by reason."""

    lines: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Reason -> (path or row, message)."""

    def add(self, reason: str, path: str, message: str) -> None:
        self.lines.setdefault(reason, []).append((path, message))

    def add_all(self, reason: str, paths: Iterable[str], message: str) -> None:
        lines = [(path, message) for path in paths]
        if lines:
            self.lines.setdefault(reason, []).extend(lines)

    def extend(self, other: Findings) -> None:
        for reason, lines in other.lines.items():
            self.lines.setdefault(reason, []).extend((path, message) for path, message in lines)

    def add_refusals(self, refusals: Sequence[Refusal]) -> None:
        for refusal in refusals:
            self.add(refusal.reason, refusal.path, refusal.message)

    def counts(self) -> dict[str, int]:
        """How many lines each reason has, most first."""
        return dict(Counter({reason: len(lines) for reason, lines in self.lines.items()})
                    .most_common())  # fmt: skip

    def write(self, path: Path) -> None:
        """One JSON object a line: `path`, `reason`, `message`.

        Raises:
            KinemaError: the disk is full, the folder may not be written.
        """
        with (
            writing(path),
            atomic_output(path) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
        ):
            for reason in self.counts():
                for name, message in self.lines[reason]:
                    line: dict[str, Any] = {"path": name, "reason": reason, "message": message}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
