"""Figures over time: a node against its own past, one word for each change.

A level (power, temperature) is compared with the median of its last readings, and a change counts
that is more than four times their usual scatter (the median absolute deviation, which a single
odd reading does not move). A link's rate is compared with its best, a count with the last one.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal

from kinema.cluster.readings import Kind, kind_of

KEEP = 60
"""Readings that make a figure's past."""
ENOUGH = 5
"""Readings before a level is judged."""
CONFIRM = 2
"""Readings in a row that a level has to be off, or right again, to count."""
QUIET = 10
"""Readings without growth after which a count is said to stand still."""
SCATTER = 4.0
MAD_TO_SIGMA = 1.4826  # of a normal distribution
TAIL = 1 << 26
"""Bytes of an old history that are read at the start."""


@dataclass(frozen=True)
class Change:
    """Something that was not so before."""

    node: str
    name: str
    state: Literal["worse", "better"]
    text: str

    def __str__(self) -> str:
        return f"{self.node}: {self.name.rpartition('/')[0] or 'node'}: {self.text}"


@dataclass
class _Figure:
    """One figure's past."""

    kind: Kind
    usual: deque[float] = field(default_factory=lambda: deque(maxlen=KEEP))
    """Readings from before it was off."""
    is_off: bool = False
    streak: int = 0
    last: float | None = None
    missing: bool = False

    def judge(self, value: float) -> tuple[Literal["worse", "better"], str] | None:
        """Take a reading; what it changes, if anything."""
        before, self.last = self.last, value
        if self.missing:
            self.missing = False
            return "better", f"{self.kind.label} is reported again"
        if self.kind.how == "count":
            return self._count(before, value)
        return self._rate(value) if self.kind.how == "rate" else self._level(value)

    def _level(self, value: float) -> tuple[Literal["worse", "better"], str] | None:
        off = len(self.usual) >= ENOUGH and self._is_far(value)
        if not off:
            self.usual.append(value)
        if off == self.is_off:
            self.streak = 0
            return None
        self.streak += 1
        if self.streak < CONFIRM:
            return None
        self.is_off, self.streak = off, 0
        middle = f"its usual {self._shown(median(self.usual))}"
        if not off:
            return "better", f"{self.kind.label} is back at {self._shown(value)}"
        verb = "fell" if self.kind.how == "falls" else "rose"
        of = f"median of {len(self.usual)} readings"
        return "worse", f"{self.kind.label} {verb} to {self._shown(value)} from {middle} ({of})"

    def _is_far(self, value: float) -> bool:
        middle = median(self.usual)
        sigma = MAD_TO_SIGMA * median(abs(one - middle) for one in self.usual)
        least = self.kind.least * (abs(middle) if self.kind.relative else 1.0)
        away = middle - value if self.kind.how == "falls" else value - middle
        return away > max(SCATTER * sigma, least)

    def _rate(self, value: float) -> tuple[Literal["worse", "better"], str] | None:
        best = max(self.usual, default=value)
        self.usual.append(max(value, best))  # the best does not age while the link is slow
        if (value < best) == self.is_off:
            return None
        self.is_off = value < best
        if self.is_off:
            return (
                "worse",
                f"{self.kind.label} fell to {self._shown(value)} from {self._shown(best)}",
            )
        return "better", f"{self.kind.label} is back at {self._shown(value)}"

    def _count(
        self, before: float | None, value: float
    ) -> tuple[Literal["worse", "better"], str] | None:
        if before is None or value < before:  # first reading, or the node was restarted
            self.is_off = False
            return None
        if value > before:
            self.streak = 0
            if self.is_off:
                return None
            self.is_off = True
            return "worse", f"{self.kind.label} grow: {value:,.0f}, before {before:,.0f}"
        self.streak += 1
        if not self.is_off or self.streak < QUIET:
            return None
        self.is_off = False
        return "better", f"{self.kind.label} stand still at {value:,.0f}"

    def _shown(self, value: float) -> str:
        return f"{value:,.4g} {self.kind.unit}".strip()


class History:
    """The past of all nodes, on disk and in memory.

    Args:
        path: JSONL, one line a node and reading: `time`, `node`, `verdict`, `readings`. What is in
            it already is a past too. None: only in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._figures: dict[tuple[str, str], _Figure] = {}
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            for record in _tail(path):
                self._take(str(record["node"]), record["readings"])

    def add(self, node: str, readings: Mapping[str, float], verdict: str) -> list[Change]:
        """Keep a node's readings; what is new about them.

        A disk that is full ends the file (which is said once), never the watch.
        """
        changes = self._take(node, readings)
        if self._path is not None:
            record = {"time": _now(), "node": node, "verdict": verdict, "readings": dict(readings)}
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            except OSError as error:
                text = f"the history ends here: {error.strerror}"
                changes.append(Change("here", f"{self._path}/", "worse", text))
                self._path = None
        return changes

    def _take(self, node: str, readings: Mapping[str, float]) -> list[Change]:
        changes = []
        for name, value in readings.items():
            figure = self._figures.setdefault((node, name), _Figure(kind_of(name)))
            said = figure.judge(value)
            if said is not None:
                changes.append(Change(node, name, *said))
        for (of, name), figure in self._figures.items():
            if of == node and name not in readings and figure.kind.always and not figure.missing:
                figure.missing = True
                text = f"{figure.kind.label} is not reported any more"
                changes.append(Change(node, name, "worse", text))
        return changes


def _tail(path: Path) -> Iterator[dict[str, Any]]:
    """The last records of a history; torn and foreign lines are left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - TAIL, 0))
        if size > TAIL:
            file.readline()
        for line in file:
            try:
                record = json.loads(line)
                known = {k: float(v) for k, v in record["readings"].items() if _known(k)}
                if known:
                    yield {"node": record["node"], "readings": known}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue


def _known(name: str) -> bool:
    try:
        kind_of(name)
    except KeyError:
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
