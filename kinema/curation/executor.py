"""What the engine asks of whatever runs the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kinema.curation.stage import Bad, Places, Result, Row, Stage


@dataclass
class Task:
    """A row on its way through a chain of stages."""

    number: int
    """Its place in the table."""
    row: Row
    """With the columns that are known; what stages find is added on the way."""
    todo: tuple[tuple[str, ...], ...]
    """For each stage of the chain, the parts that are still to be found."""
    known: tuple[Row, ...] = ()
    """For each stage, the columns that are known of it: they are in the row after that stage, and
    not before, as if it had just found them."""
    tries: int = field(default=0, compare=False)
    """Times that its worker died or hung."""


@dataclass(frozen=True)
class Done:
    """What one stage found for one row."""

    number: int
    stage: int
    """Place in the chain."""
    row: Row
    """As the stage saw it: what the result depends on."""
    result: Result
    seconds: float
    """The row's share of its batch's time in the worker."""


class Executor(Protocol):
    """Runs chains of stages. A task goes from stage to stage as soon as it can, so that GPU stages
    work beside CPU ones; a slow stage holds back the ones before it."""

    name: str
    """`local` or `ray`."""

    def workers(self, stage: Stage) -> int:
        """Processes that run this stage."""
        ...

    def stream(
        self, stages: Sequence[Stage], tasks: Iterator[Task], places: Places
    ) -> Iterator[Done]:
        """Take tasks as there is room for them, and yield every stage's results as they come, those
        of one row in the order of the stages. A row that a stage answered with `Bad` goes no
        further.

        A worker that dies or hangs costs no row: its batch is run again, then row by row, and only
        the row that does it again is `Bad`.

        Raises:
            KinemaError: a stage cannot be opened, or cannot go on.
        """
        ...

    def close(self) -> None: ...


def is_bad(result: Result) -> bool:
    """Whether a row goes no further: a part of it has no result."""
    return any(isinstance(found, Bad) for found in result.values())


def merged(row: Row, result: Result) -> Row:
    """The row with what a stage found."""
    found = dict(row)
    for columns in result.values():
        if not isinstance(columns, Bad):
            found |= columns
    return found


def after(task: Task, place: int, result: Result) -> Task:
    """A task that has passed a stage."""
    known = task.known[place] if task.known else {}
    return replace(task, row=merged(task.row, result) | known, tries=0)
