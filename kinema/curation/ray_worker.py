"""What Ray's processes do with tasks: the same seats as here, one in each process.

A seat runs its stage in a process of its own below Ray's, so that time limits and rows that kill
their worker are dealt with as on one machine. What is found goes to the driver by the mailbox as
soon as it is there, not with the row at the end of the chain.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from kinema.config.errors import KinemaError
from kinema.curation.chain import Chain, Seat, pool_for, seat_for
from kinema.curation.executor import Done, Task, after, is_bad
from kinema.curation.local import all_cores
from kinema.curation.stage import Places, Stage
from kinema.curation.worker import packed
from kinema.media.pool import DecodePool
from kinema.media.stores import read_bytes

COLUMN = "task"
LETTER_S = 0.25
"""Seconds between letters of a call that goes on for long."""
_seats: dict[bytes, Seat] = {}
"""Seats of this process, by the stage's pickle."""
_pools: list[DecodePool] = []
"""One process for all stages without a model, as on one machine; none until it is wanted."""


class Mailbox:
    """An actor that holds what workers found until the driver fetches it."""

    def __init__(self) -> None:
        self._letters: list[bytes] = []
        self._failure: bytes | None = None

    def put(self, letter: bytes) -> None:
        """Leave a pickled list of `Done`."""
        self._letters.append(letter)

    def fail(self, error: bytes) -> None:
        """Leave a pickled exception; the first one counts."""
        self._failure = self._failure or error

    def fetch(self) -> tuple[list[bytes], bytes | None]:
        """All letters since the last time, and the exception if there is one."""
        letters, self._letters = self._letters, []
        return letters, self._failure


def table_of(tasks: Sequence[Task]) -> pa.Table:
    """Tasks as they travel through Ray Data."""
    pickles = [pickle.dumps(task) for task in tasks]
    return pa.table({COLUMN: pa.array(pickles, pa.large_binary())})


def serve(table: pa.Table, stage: Stage, places: Places, position: int, mailbox: Any) -> pa.Table:
    """One batch of tasks at one stage.

    Returns:
        The tasks, with what was found in their rows; those that go no further ask nothing more.
    """
    blob = packed(stage, places)
    if blob not in _seats:
        if not _pools:
            _pools.append(pool_for(models=False, workers=1))
        _seats[blob] = seat_for(stage, places, 1, pool=_pools[0])
    return _serve(_seats[blob], table, position, mailbox)


class Server:
    """The same, in an actor that keeps its model."""

    def __init__(
        self, stage: Stage, places: Places, position: int, mailbox: Any, has_gpu: bool
    ) -> None:
        self._seat = seat_for(stage, places, 1, [{} if has_gpu else all_cores()])
        self._position = position
        self._mailbox = mailbox

    def __call__(self, table: pa.Table) -> pa.Table:
        return _serve(self._seat, table, self._position, self._mailbox)


def _serve(seat: Seat, table: pa.Table, position: int, mailbox: Any) -> pa.Table:
    import ray

    # Made by `table_of` in this run.
    tasks: list[Task] = [pickle.loads(one) for one in table.column(COLUMN).to_pylist()]  # noqa: S301
    here = [
        Task(place, task.row, (task.todo[position],))
        for place, task in enumerate(tasks)
        if task.todo[position]
    ]
    for place, task in enumerate(tasks):
        if not task.todo[position]:
            tasks[place] = after(task, position, {})
    letter: list[Done] = []
    sent = time.monotonic()
    try:
        for done in Chain([seat], iter(here)).run():
            task = tasks[done.number]
            letter.append(replace(done, number=task.number, stage=position))
            if is_bad(done.result):
                tasks[done.number] = replace(task, todo=((),) * len(task.todo))
            else:
                tasks[done.number] = after(task, position, done.result)
            if time.monotonic() - sent > LETTER_S:
                ray.get(mailbox.put.remote(pickle.dumps(letter)))
                letter, sent = [], time.monotonic()
    except Exception as error:
        ray.get(mailbox.fail.remote(_pickled(error)))
        raise
    finally:
        if letter:
            ray.get(mailbox.put.remote(pickle.dumps(letter)))
    return table_of(tasks)


def _pickled(error: Exception) -> bytes:
    try:
        return pickle.dumps(error)
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def sees(marker: str, version: str) -> str:
    """What keeps this node from working on a run, in words; empty if nothing does.

    Args:
        marker: a file that the driver has written in the run's folder.
        version: of the driver's `kinema`.
    """
    from importlib.metadata import version as installed

    if installed("kinema") != version:
        return f"it has kinema {installed('kinema')}, here it is {version}"
    try:
        read_bytes(marker)
    except (OSError, KinemaError) as error:
        return f"it cannot read the run's folder ({error})"
    return ""
