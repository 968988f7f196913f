"""Runs chains of stages over tables of rows: what is known is recalled, what is missing is found
and kept as it comes."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from kinema.curation.executor import Executor, Task, merged
from kinema.curation.files import Present
from kinema.curation.stage import Bad, Part, Places, Row, Stage, result_key
from kinema.curation.store import ResultStore
from kinema.media.stores import is_url
from kinema.telemetry.progress import Progress

CHUNK = 1024
"""Rows that are looked up at once."""


@dataclass(frozen=True)
class BadRow:
    """A row that a stage had no result for."""

    id: str
    path: str
    stage: str
    part: str
    reason: str
    message: str
    passing: bool = False


@dataclass
class StageStats:
    """What a stage did in one call."""

    name: str
    gpu: bool = False
    workers: int = 1
    computed: int = 0
    """Rows that went through it."""
    recalled: int = 0
    """Rows whose parts were all known."""
    bad: int = 0
    worker_s: float = 0.0
    """Seconds in the stage, added up over workers."""
    wall_s: float = 0.0
    """From its first result to its last, and the time of the first."""
    video_hours: float = 0.0
    """Of the computed rows."""
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def rows_per_s(self) -> float:
        """Computed rows per second of one worker; 0 where nothing was computed."""
        return self.computed / self.worker_s if self.worker_s else 0.0

    @property
    def hours_per_core_hour(self) -> float:
        """Hours of video per hour of one worker."""
        return self.video_hours * 3600 / self.worker_s if self.worker_s else 0.0


@dataclass(frozen=True)
class StagesReport:
    """What a call of `run_stages` gave."""

    table: pa.Table
    """The rows as they came, with the columns of all parts: null where a row was bad, or where an
    earlier stage had it stopped."""
    bad: list[BadRow]
    """By stage and row: of each row the first stage that had nothing."""
    stats: list[StageStats]
    """Of each stage, in order."""


def run_stages(
    stages: Sequence[Stage],
    table: pa.Table,
    *,
    places: Places,
    store: ResultStore,
    executor: Executor,
    label: str,
) -> StagesReport:
    """Take every row of a table through a chain of stages.

    Results are in the store as soon as they arrive: a run that is stopped (also killed) goes on
    with what is missing when it is called again.

    Args:
        table: with `id`, `state`, `path`.
        label: what the progress is called.

    Raises:
        KinemaError: a stage cannot be opened or cannot go on; what was found is kept.
    """
    call = _Call(stages, table, places, store)
    stats = [StageStats(s.name, s.gpu, executor.workers(s)) for s in stages]
    start = time.monotonic()
    with Progress(label, total=table.num_rows, unit="row") as bar:
        for done in executor.stream(stages, call.tasks(bar.advance, stats), places):
            one = stats[done.stage]
            call.keep(done.stage, done.number, done.row, done.result, one)
            one.computed += 1
            one.worker_s += done.seconds
            one.wall_s = time.monotonic() - start
            known = merged(done.row, done.result)
            one.video_hours += float(known.get("duration") or 0) / 3600
            if call.ended(done.number, done.stage):
                bar.advance(note=_bottleneck(stats, call.behind))
    return call.report(stats)


def recall(
    stages: Sequence[Stage], table: pa.Table, *, places: Places, store: ResultStore
) -> StagesReport:
    """What is known of rows without finding anything: as `run_stages`, null for the rest."""
    call = _Call(stages, table, places, store)
    stats = [StageStats(stage.name, stage.gpu) for stage in stages]
    for _ in call.tasks(lambda: None, stats):
        pass
    return call.report(stats)


def _bottleneck(stats: Sequence[StageStats], behind: Counter[int]) -> str:
    """Where rows wait, in words."""
    if len(stats) < 2 or not behind:
        return ""
    stage = max(behind, key=lambda number: behind[number])
    return f"{behind[stage]} at {stats[stage].name}"


class _Chunk:
    """Some rows of a call, while it is found out what is known of them."""

    def __init__(self, first: int, rows: list[Row]) -> None:
        self.first = first
        self.rows = rows
        self.seen = list(rows)
        """With the columns that keys depend on."""
        self.found: dict[str, Any] = {}
        """Part -> where the result of each row is, -1 where it is missing."""
        self.todo: list[list[tuple[str, ...]]] = [[] for _ in rows]
        self.unsure: list[set[str]] = [set() for _ in rows]
        """Columns that will be found in this call."""
        self.alive = [True] * len(rows)
        """Whether no part of the row's has been bad so far."""


class _Call:
    """The rows of one call, and where each of them is."""

    def __init__(
        self, stages: Sequence[Stage], table: pa.Table, places: Places, store: ResultStore
    ) -> None:
        self._stages = stages
        self._table = table
        self._places = places
        self._store = store
        self._present = Present()
        self._parts = [list(stage.parts) for stage in stages]
        given: dict[str, str] = {}
        for part in (p for parts in self._parts for p in parts):
            for name in part.columns:
                assert name not in given, f"{name!r} is given by {given[name]!r} and {part.name!r}"
                given[name] = part.name
        self._depended_on = {name for parts in self._parts for p in parts for name in p.depends}
        self._known = {p.name: store.known(p) for parts in self._parts for p in parts}
        count = table.num_rows
        self._keys = {p.name: np.zeros(count, "S32") for parts in self._parts for p in parts}
        """Under what each row's result is kept; empty where no stage came to ask."""
        self._passing: dict[str, dict[int, Bad]] = {p: {} for p in self._keys}
        """Failures that are not kept."""
        self._last: dict[int, int] = {}
        """Rows under way -> the last stage that has something to find for them."""
        self.behind: Counter[int] = Counter()
        """Stage -> rows under way that it has not answered."""

    def tasks(self, known: Callable[[], None], stats: list[StageStats]) -> Iterator[Task]:
        """The rows for which something is missing, in the order of the table.

        Args:
            known: called for each of the others.
        """
        for first in range(0, self._table.num_rows, CHUNK):
            chunk = _Chunk(first, self._table.slice(first, CHUNK).to_pylist())
            for number, parts in enumerate(self._parts):
                self._look_up(number, parts, chunk, stats[number])
            self._ask_for_lost_files(chunk, stats)
            asked = [i for i, todo in enumerate(chunk.todo) if any(todo)]
            columns = self._columns(chunk, asked)
            for _ in range(len(chunk.rows) - len(asked)):
                known()
            for i, of_row in zip(asked, columns, strict=True):
                todo = chunk.todo[i]
                stages = [number for number, names in enumerate(todo) if names]
                self._last[first + i] = stages[-1]
                self.behind.update(stages)
                yield Task(first + i, chunk.rows[i], tuple(todo), tuple(of_row))

    def _look_up(
        self, number: int, parts: Sequence[Part], chunk: _Chunk, stats: StageStats
    ) -> None:
        """Find out what is known of one stage of a chunk of rows."""
        reasons: list[list[str | None]] = []
        for part in parts:
            keys = np.zeros(len(chunk.rows), "S32")
            for i, row in enumerate(chunk.seen):
                if chunk.alive[i] and not chunk.unsure[i] & {*part.depends}:
                    keys[i] = result_key(row, part).encode()
            self._keys[part.name][chunk.first : chunk.first + len(keys)] = keys
            found = chunk.found[part.name] = self._known[part.name].find(keys)
            reasons.append(self._known[part.name].take(found, ["reason"])["reason"].to_pylist())
        for i in range(len(chunk.rows)):
            names = [
                part.name for part in parts if chunk.alive[i] and chunk.found[part.name][i] < 0
            ]
            chunk.todo[i].append(tuple(names))
            for part in parts:
                if part.name in names:
                    chunk.unsure[i] |= set(part.columns)
            if chunk.alive[i] and not names:
                stats.recalled += 1
        for part in parts:
            needed = [name for name in part.columns if name in self._depended_on]
            if needed:
                self._see(chunk, part, needed)
        for i in range(len(chunk.rows)):
            # What is missing beside a bad part is still found, and is the last of this row.
            chunk.alive[i] &= all(reason[i] is None for reason in reasons)

    def _see(self, chunk: _Chunk, part: Part, names: Sequence[str]) -> None:
        """Let later stages' keys depend on columns that are known."""
        found = chunk.found[part.name]
        for i, row in enumerate(self._known[part.name].take(found, names).to_pylist()):
            if chunk.alive[i] and found[i] >= 0:
                chunk.seen[i] = chunk.seen[i] | row

    def _ask_for_lost_files(self, chunk: _Chunk, stats: list[StageStats]) -> None:
        """Let files be made anew that results name and nobody finds. What a stage makes of a row
        is always the same, so results that came of these files stay."""
        for number, parts in enumerate(self._parts):
            for part in parts:
                if part.file is None:
                    continue
                found = chunk.found[part.name]
                names = self._known[part.name].take(found, [part.file]).column(0).to_pylist()
                for i, name in enumerate(names):
                    todo = chunk.todo[i]
                    if name is None or not self._is_lost(part, name, any(todo[number + 1 :])):
                        continue
                    found[i] = -1
                    self._keys[part.name][chunk.first + i] = b""
                    stats[number].recalled -= not todo[number]
                    todo[number] = (*todo[number], part.name)

    def _is_lost(self, part: Part, name: str, read: bool) -> bool:
        """Whether a result's file is gone and wanted.

        Args:
            read: whether a later stage has something to find, and may read the file.
        """
        if os.path.isabs(name) or is_url(name):
            return False  # a file used where it is: no work of this run
        assert part.file is not None
        if part.file.startswith("_"):
            return read and f"{self._places.signals}/{name}" not in self._present
        return f"{self._places.out}/{name}" not in self._present

    def _columns(self, chunk: _Chunk, asked: list[int]) -> list[list[Row]]:
        """Of each row that is asked about, the columns that are known of each stage."""
        columns: list[list[Row]] = [[{} for _ in self._parts] for _ in asked]
        for number, parts in enumerate(self._parts):
            for part in parts:
                found = chunk.found[part.name][asked]
                if not (found >= 0).any():
                    continue
                known = self._known[part.name].take(found, ["reason", *part.columns]).to_pylist()
                for place, row in enumerate(known):
                    if found[place] >= 0 and row.pop("reason") is None:
                        columns[place][number] |= row
        return columns

    def keep(self, number: int, place: int, row: Row, result: Any, stats: StageStats) -> None:
        """Take in what a stage found for a row."""
        bad = [found for found in result.values() if isinstance(found, Bad)]
        stats.bad += bool(bad)
        stats.reasons.update({one.reason for one in bad})
        for part in self._parts[number]:
            if part.name not in result:
                continue
            key = result_key(row, part)
            self._keys[part.name][place] = key.encode()
            found = result[part.name]
            if isinstance(found, Bad) and found.passing:
                self._passing[part.name][place] = found
            self._store.keep(part, [(key, row["id"], found)])
        self.behind[number] -= 1
        if bad:
            self._last[place] = number  # it goes no further

    def ended(self, place: int, number: int) -> bool:
        """Whether a row is through with the call."""
        if self._last.get(place) != number:
            return False
        del self._last[place]
        return True

    def report(self, stats: list[StageStats]) -> StagesReport:
        """All that is known now."""
        table, count = self._table, self._table.num_rows
        bad: list[BadRow] = []
        stopped = np.zeros(count, bool)
        for stage, parts in zip(self._stages, self._parts, strict=True):
            failed = np.zeros(count, bool)
            for part in parts:
                known = self._store.known(part)
                # What a stopped row has of later stages is not its own any more.
                keys = np.where(stopped, b"", self._keys[part.name])
                found = known.find(keys)
                columns = known.take(found, ["reason", "message", *part.columns])
                table = _with(table, part, columns)
                reasons = columns.column("reason").to_pylist()
                messages = columns.column("message").to_pylist()
                lost: dict[int, Bad] = {
                    place: Bad(reason, messages[place])
                    for place, reason in enumerate(reasons)
                    if reason is not None
                }
                lost |= self._passing[part.name]
                for place in sorted(lost):
                    if stopped[place] or failed[place]:
                        continue
                    one = lost[place]
                    failed[place] = True
                    bad.append(self._bad(stage, part, place, one))
            stopped |= failed
        return StagesReport(table, bad, stats)

    def _bad(self, stage: Stage, part: Part, place: int, bad: Bad) -> BadRow:
        row = self._table.slice(place, 1).select(["id", "path"]).to_pylist()[0]
        return BadRow(
            row["id"], row["path"], stage.name, part.name, bad.reason, bad.message, bad.passing
        )


def _with(table: pa.Table, part: Part, found: pa.Table) -> pa.Table:
    """The table with a part's columns, in place of those of the same names."""
    for name, kind in part.columns.items():
        column = found.column(name)
        field_ = pa.field(name, kind)
        place = table.schema.get_field_index(name)
        if place < 0:
            table = table.append_column(field_, column)
        else:
            table = table.set_column(place, field_, column)
    return table
