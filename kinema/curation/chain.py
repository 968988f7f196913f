"""Tasks on their way through stages: what waits where, what runs, what is tried again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice

from kinema.config.errors import KinemaError
from kinema.curation.executor import Done, Task, after, is_bad
from kinema.curation.stage import Bad, Places, Result, Stage
from kinema.curation.worker import packed, run_batch
from kinema.media.errors import MediaError
from kinema.media.pool import DecodePool

TRIES = 2
"""Times that a row may be in a batch whose worker died, and alone again as often."""
OPEN_S, OPEN_MODEL_S = 60.0, 1200.0
"""For opening a stage, which the first call in a process does; large models on slow disks."""
AHEAD = 2
"""Batches per worker that wait before a stage: what comes before it stops there."""
CPU_BYTES, MODEL_BYTES = 4 << 30, 1 << 40
"""Resident memory at which a worker is replaced; one with a model would load it anew."""
Answer = tuple[list[Result], float]


def only_waits(stage: Stage) -> bool:
    """Whether a stage's calls spend their time waiting for an endpoint: they run in threads of one
    process, which keeps its pace and budget."""
    alone = getattr(stage, "max_workers", None) == 1
    return not stage.gpu and (stage.threads > 1 or alone)


def pool_for(
    *, models: bool, workers: int, environments: Sequence[Mapping[str, str]] = ()
) -> DecodePool:
    """Worker processes for a stage with a model, or for stages without."""
    if models:
        return DecodePool(
            workers,
            OPEN_MODEL_S,
            calls_per_worker=1 << 60,
            worker_bytes=MODEL_BYTES,
            environments=environments,
        )
    return DecodePool(workers, OPEN_S, worker_bytes=CPU_BYTES, environments=environments)


def seat_for(
    stage: Stage,
    places: Places,
    workers: int,
    environments: Sequence[Mapping[str, str]] = (),
    *,
    pool: DecodePool | None = None,
) -> Seat:
    """Where a stage can run.

    Args:
        environments: variables of each worker.
        pool: that of several stages; None: the stage gets workers, or threads, of its own.
    """
    blob = packed(stage, places)
    if only_waits(stage):
        threads = ThreadPoolExecutor(stage.threads, thread_name_prefix=stage.name)
        return Seat(stage, blob, stage.threads, threads=threads)
    if pool is not None:
        return Seat(stage, blob, workers, pool=pool)
    own = pool_for(models=stage.gpu, workers=workers, environments=environments)
    return Seat(stage, blob, workers, pool=own, own=True)


@dataclass
class Seat:
    """Where a stage runs, and what waits for it."""

    stage: Stage
    blob: bytes
    workers: int
    pool: DecodePool | None = None
    threads: ThreadPoolExecutor | None = None
    own: bool = False
    waiting: deque[Task] = field(default_factory=deque)
    again: deque[list[Task]] = field(default_factory=deque)
    """Batches whose worker died."""
    running: dict[Future[Answer], list[Task]] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Rows that may still come to wait here."""
        return self.workers * self.stage.batch * AHEAD - len(self.waiting)

    @property
    def free(self) -> bool:
        # One call more than workers: the next is there when one ends.
        return len(self.running) < self.workers + (self.pool is not None)

    def submit(self, batch: list[Task], position: int) -> None:
        rows = [task.row | {"todo": list(task.todo[position])} for task in batch]
        label = str(rows[0]["path"])
        if self.pool is None:
            assert self.threads is not None
            future = self.threads.submit(run_batch, label, self.blob, rows)
        else:
            limit = sum(self.stage.time_limit_s(row) for row in rows)
            limit += OPEN_MODEL_S if self.stage.gpu else OPEN_S
            future = self.pool.submit(run_batch, label, self.blob, rows, timeout_s=limit)
        self.running[future] = batch

    def close(self) -> None:
        for future in self.running:
            future.cancel()
        if self.own and self.pool is not None:
            self.pool.close()
        if self.threads is not None:
            self.threads.shutdown(wait=True, cancel_futures=True)


class Chain:
    """The tasks of one call, between the stages."""

    def __init__(self, seats: list[Seat], tasks: Iterator[Task]) -> None:
        self._seats = seats
        self._tasks = tasks
        self._more = True

    def run(self) -> Iterator[Done]:
        while True:
            self._start()
            running = [future for seat in self._seats for future in seat.running]
            if not running:
                assert not any(seat.waiting or seat.again for seat in self._seats)
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for position, seat in enumerate(self._seats):
                for future in [f for f in seat.running if f in finished]:
                    yield from self._finish(position, seat, future)

    def _start(self) -> None:
        """Start what can be started, the last stages first: they make room for the others."""
        # Rows that only a later stage is missing for go straight there: all must have room.
        while self._more and (room := min(seat.room for seat in self._seats)) > 0:
            taken = list(islice(self._tasks, room))
            self._more = bool(taken)
            for task in taken:
                self._enter(task, 0)
        for position in reversed(range(len(self._seats))):
            seat = self._seats[position]
            while seat.free and seat.again:
                seat.submit(seat.again.popleft(), position)
            while seat.free and seat.waiting and self._room_after(position):
                # A batch that is not full is started when nothing more is on its way to it.
                if len(seat.waiting) < seat.stage.batch and self._coming(position):
                    break
                size = min(seat.stage.batch, len(seat.waiting))
                seat.submit([seat.waiting.popleft() for _ in range(size)], position)

    def _room_after(self, position: int) -> bool:
        later = self._seats[position + 1 :]
        return all(seat.room > 0 for seat in later[:1])

    def _coming(self, position: int) -> bool:
        before = self._seats[:position]
        return self._more or any(seat.waiting or seat.again or seat.running for seat in before)

    def _enter(self, task: Task, position: int) -> None:
        """Let a task wait at the first stage from `position` on that has something to find."""
        for place in range(position, len(self._seats)):
            if task.todo[place]:
                self._seats[place].waiting.append(task)
                return
            task = after(task, place, {})

    def _finish(self, position: int, seat: Seat, future: Future[Answer]) -> Iterator[Done]:
        batch = seat.running.pop(future)
        try:
            results, seconds = future.result()
        except MediaError as error:
            if error.reason not in ("timeout", "crashed"):
                raise
            yield from self._again(position, seat, batch, error)
            return
        except KinemaError:
            raise
        except Exception as mistake:
            paths = ", ".join(str(task.row["path"]) for task in batch[:3])
            mistake.add_note(f"in the stage {seat.stage.name!r}, at {paths}")
            raise
        for task, result in zip(batch, results, strict=True):
            yield Done(task.number, position, task.row, result, seconds / len(batch))
            if not is_bad(result):
                self._enter(after(task, position, result), position + 1)

    def _again(
        self, position: int, seat: Seat, batch: list[Task], error: MediaError
    ) -> Iterator[Done]:
        """Run a batch again whose worker died; the second time each row alone."""
        for task in batch:
            task.tries += 1
        if batch[0].tries < TRIES:
            seat.again.append(batch)
        elif len(batch) > 1:
            for task in batch:
                task.tries = 0
                seat.again.append([task])
        else:
            (task,) = batch
            bad = Bad(error.reason, error.what, passing=True)
            result: Result = {name: bad for name in task.todo[position]}
            yield Done(task.number, position, task.row, result, 0.0)
