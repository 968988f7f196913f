"""Runs chains of stages over tables of rows: what is known is recalled, what is missing is found
and kept as it comes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from kinema.curation.executor import Executor, Task, merged
from kinema.curation.stage import Bad, Part, Places, Row, Stage, result_key
from kinema.curation.store import ResultStore
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
    call = _Call(stages, table, store)
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


def recall(stages: Sequence[Stage], table: pa.Table, store: ResultStore) -> StagesReport:
    """What is known of rows without finding anything: as `run_stages`, null for the rest."""
    call = _Call(stages, table, store)
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


class _Call:
    """The rows of one call, and where each of them is."""

    def __init__(self, stages: Sequence[Stage], table: pa.Table, store: ResultStore) -> None:
        self._stages = stages
        self._table = table
        self._store = store
        self._parts = [list(stage.parts) for stage in stages]
        given: dict[str, str] = {}
        for part in (p for parts in self._parts for p in parts):
            for name in part.columns:
                assert name not in given, f"{name!r} is given by {given[name]!r} and {part.name!r}"
                given[name] = part.name
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
            chunk = self._table.slice(first, CHUNK)
            rows: list[Row] = chunk.to_pylist()
            todo: list[list[tuple[str, ...]]] = [[] for _ in rows]
            unsure: list[set[str]] = [set() for _ in rows]
            """Columns that will be found in this call."""
            alive = [True] * len(rows)
            for number, parts in enumerate(self._parts):
                self._look_up(number, parts, first, rows, todo, unsure, alive, stats[number])
            for place, row in enumerate(rows):
                if not any(todo[place]):
                    known()
                    continue
                asked = [n for n, names in enumerate(todo[place]) if names]
                self._last[first + place] = asked[-1]
                self.behind.update(asked)
                yield Task(first + place, row, tuple(todo[place]))

    def _look_up(
        self,
        number: int,
        parts: Sequence[Part],
        first: int,
        rows: list[Row],
        todo: list[list[tuple[str, ...]]],
        unsure: list[set[str]],
        alive: list[bool],
        stats: StageStats,
    ) -> None:
        """Find out what one stage knows of a chunk of rows, and add it to them."""
        missing: list[list[str]] = [[] for _ in rows]
        bad: list[bool] = [True] * len(rows)
        for part in parts:
            known = self._known[part.name]
            keys = np.array(
                [
                    result_key(row, part) if alive[i] and not unsure[i] & {*part.depends} else ""
                    for i, row in enumerate(rows)
                ],
                dtype="S32",
            )
            found = known.find(keys)
            self._keys[part.name][first : first + len(rows)] = keys
            columns = known.take(found).to_pylist()
            for i, row in enumerate(rows):
                if not alive[i]:
                    continue
                if found[i] < 0:
                    missing[i].append(part.name)
                    bad[i] = False
                elif columns[i]["reason"] is None:
                    row |= {name: columns[i][name] for name in part.columns}
                    bad[i] = False
        for i in range(len(rows)):
            names = missing[i] if alive[i] else []
            todo[i].append(tuple(names))
            for part in parts:
                if part.name in names:
                    unsure[i] |= set(part.columns)
            if alive[i] and not names:
                stats.recalled += 1
                alive[i] = not bad[i]

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
        if bad and len(bad) == len(result):
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
                found = known.find(self._keys[part.name])
                columns = known.take(found)
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
        column = found.column(name).cast(kind)
        field_ = pa.field(name, kind)
        place = table.schema.get_field_index(name)
        if place < 0:
            table = table.append_column(field_, column)
        else:
            table = table.set_column(place, field_, column)
    return table
