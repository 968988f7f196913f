"""Stages in processes of this machine."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice

from kinema.config.errors import KinemaError
from kinema.curation.executor import Done, Task, is_bad, merged
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


class LocalExecutor:
    """Worker processes: all CPU stages share `workers` of them, each stage with a model has its
    own, one per GPU (or one, with all cores, where there is none). Stages that only wait for an
    endpoint run in threads of this process."""

    name = "local"

    def __init__(self, workers: int, *, gpus: int | None = None) -> None:
        """
        Args:
            workers: processes for CPU stages, at least 1.
            gpus: None: all that PyTorch sees.
        """
        assert workers >= 1
        self._workers = workers
        self._gpus = gpus
        self._cpu: DecodePool | None = None
        self._threads: list[ThreadPoolExecutor] = []

    def workers(self, stage: Stage) -> int:
        """See `Executor`."""
        if stage.gpu:
            return max(1, self.gpus)
        return 1 if _only_waits(stage) else self._workers

    @property
    def gpus(self) -> int:
        """GPUs to use."""
        if self._gpus is None:
            import torch

            self._gpus = torch.cuda.device_count()
        return self._gpus

    def close(self) -> None:
        """End all workers."""
        if self._cpu is not None:
            self._cpu.close()
            self._cpu = None

    def stream(
        self, stages: Sequence[Stage], tasks: Iterator[Task], places: Places
    ) -> Iterator[Done]:
        """See `Executor`."""
        seats = [self._seat(stage, places) for stage in stages]
        try:
            yield from _Chain(seats, tasks).run()
        finally:
            for seat in seats:
                seat.close()

    def _seat(self, stage: Stage, places: Places) -> _Seat:
        workers = self.workers(stage)
        blob = packed(stage, places)
        if stage.gpu:
            environments = [{"CUDA_VISIBLE_DEVICES": name} for name in _gpu_names(self.gpus)] or [
                {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
            ]
            pool = DecodePool(
                workers, OPEN_MODEL_S, calls_per_worker=1 << 60, worker_bytes=MODEL_BYTES,
                environments=environments,
            )  # fmt: skip
            return _Seat(stage, blob, workers, pool=pool, own=True)
        if _only_waits(stage):
            threads = ThreadPoolExecutor(stage.threads, thread_name_prefix=stage.name)
            return _Seat(stage, blob, stage.threads, threads=threads)
        if self._cpu is None:
            self._cpu = DecodePool(self._workers, OPEN_S, worker_bytes=CPU_BYTES)
        return _Seat(stage, blob, workers, pool=self._cpu)


def _only_waits(stage: Stage) -> bool:
    """Whether calls of a stage spend their time waiting: `threads` of them in one process."""
    return not stage.gpu and stage.threads > 1


def _gpu_names(count: int) -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(count)]
    return names[:count]


@dataclass
class _Seat:
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


class _Chain:
    """The tasks of one call, between the stages."""

    def __init__(self, seats: list[_Seat], tasks: Iterator[Task]) -> None:
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

    def _finish(self, position: int, seat: _Seat, future: Future[Answer]) -> Iterator[Done]:
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
                self._enter(replace(task, row=merged(task.row, result), tries=0), position + 1)

    def _again(
        self, position: int, seat: _Seat, batch: list[Task], error: MediaError
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
