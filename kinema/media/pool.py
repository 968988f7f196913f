"""Decoding where it can be killed: worker processes with a time limit for every call."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

from kinema.config.errors import KinemaError
from kinema.media.channel import Channel
from kinema.media.errors import MediaError

Item = TypeVar("Item")
Result = TypeVar("Result")

KILLED_S = 5.0
"""How long a killed worker may take to be gone: one that hangs in the kernel (a disk, a network
file system) stays until that lets it go, and nobody can wait for it."""
STARTING_S = 60.0
"""How long a worker may take to start; not part of any call's limit."""


class DecodePool:
    """Runs `function(path, *args)` in processes that are killed past the time limit.

    A worker is replaced after a call that took too long or killed it, after `calls_per_worker`
    calls, and when its memory grows beyond `worker_bytes`. Workers start when first needed, know
    nothing of torch or of the main module, and end with this process however it ends.

    Use it as a context manager; one pool serves many threads.
    """

    def __init__(
        self,
        workers: int,
        timeout_s: float,
        *,
        calls_per_worker: int = 2000,
        worker_bytes: int = 1 << 30,
        environments: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Args:
        workers: processes, at least 1.
        timeout_s: limit for one call, in seconds.
        calls_per_worker: calls after which a worker is replaced.
        worker_bytes: resident memory at which a worker is replaced.
        environments: variables of each worker beside this process's own (which GPU it has).
        """
        assert workers >= 1
        self.workers = workers
        self.timeout_s = timeout_s
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._closed = False
        given = [*environments, *({} for _ in range(workers - len(environments)))]
        self._seats = [
            _Seat(self._tasks, calls_per_worker, worker_bytes, given[number])
            for number in range(workers)
        ]

    def submit(
        self,
        function: Callable[..., Result],
        path: str | os.PathLike[str],
        *args: Any,
        timeout_s: float | None = None,
    ) -> Future[Result]:
        """Start a call.

        The future raises what `function` raises, and MediaError if the call exceeds the time limit
        (`timeout`) or kills its worker (`crashed`).

        Args:
            function: importable by name, from a module that imports without torch.
            path: the file, handed to `function` first and named in errors.
            args: further arguments, picklable.
            timeout_s: limit for this call, in seconds; default: the pool's.
        """
        assert not self._closed, "the pool is closed"
        future: Future[Result] = Future()
        limit = self.timeout_s if timeout_s is None else timeout_s
        self._tasks.put(_Task(future, function, path, args, limit))
        return future

    def map(
        self,
        function: Callable[..., Result],
        items: Iterable[Item],
        *,
        call: Callable[[Item], tuple[Any, ...]] | None = None,
        ordered: bool = True,
        in_flight: int | None = None,
    ) -> Iterator[tuple[Item, Result | MediaError]]:
        """`(item, result or MediaError)` for every item.

        Args:
            function: as for `submit`.
            items: read as needed, never further ahead than `in_flight`.
            call: `item -> (path, *args)`; by default the item is the path.
            ordered: False yields results as they come.
            in_flight: calls started and not yet yielded (default: four per worker).
        """
        limit = in_flight or 4 * self.workers
        source = iter(items)
        pending: deque[tuple[Item, Future[Result]]] = deque()
        try:
            while True:
                for item in islice(source, limit - len(pending)):
                    path, *args = call(item) if call else (item,)
                    pending.append((item, self.submit(function, path, *args)))
                if not pending:
                    return
                if not ordered:
                    wait([f for _, f in pending], return_when=FIRST_COMPLETED)
                    pending.rotate(-next(i for i, (_, f) in enumerate(pending) if f.done()))
                item, future = pending.popleft()
                try:
                    yield item, future.result()
                except MediaError as error:
                    yield item, error
        finally:
            for _, future in pending:
                future.cancel()

    def close(self) -> None:
        """Kill the workers; calls that have not finished are cancelled."""
        self._closed = True
        for seat in self._seats:
            seat.close()
        for _ in self._seats:
            self._tasks.put(None)
        for seat in self._seats:
            seat.join()
        while not self._tasks.empty():
            task = self._tasks.get()
            if task is not None:
                task.future.cancel()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are running."""
        return [pid for seat in self._seats if (pid := seat.pid) is not None]

    def at_work(self) -> list[tuple[int, str, float]]:
        """The calls that run now: (process id of the worker, file, seconds)."""
        return [call for seat in self._seats if (call := seat.call) is not None]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Task:
    future: Future[Any]
    function: Callable[..., Any]
    path: str | os.PathLike[str]
    args: tuple[Any, ...]
    timeout_s: float


class _Seat:
    """A thread that gives tasks to one worker process after another."""

    def __init__(
        self,
        tasks: queue.SimpleQueue[_Task | None],
        calls_per_worker: int,
        worker_bytes: int,
        environment: Mapping[str, str],
    ) -> None:
        self._tasks = tasks
        self._environment = environment
        self._calls_per_worker = calls_per_worker
        self._worker_bytes = worker_bytes
        self._worker: _Worker | None = None
        self._call: tuple[str, float] | None = None
        self._closed = False
        self._lock = threading.Lock()
        """Held while a worker starts, so that none starts after `close`."""
        self._thread = threading.Thread(target=self._serve, name="decode-pool", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        worker = self._worker
        return worker.process.pid if worker else None

    @property
    def call(self) -> tuple[int, str, float] | None:
        """The call that runs: (process id of the worker, file, seconds)."""
        pid, call = self.pid, self._call
        return None if call is None else (pid or 0, call[0], time.monotonic() - call[1])

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._worker:
                self._worker.process.kill()

    def join(self) -> None:
        self._thread.join()

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            if task.future.set_running_or_notify_cancel():
                self._call = (str(task.path), time.monotonic())
                try:
                    self._run(task)
                except BaseException as mistake:
                    # Nobody else answers this call: without an answer it is waited for for ever.
                    if not task.future.done():
                        self._fail(task, mistake)
                finally:
                    self._call = None
        self._dismiss()

    def _run(self, task: _Task) -> None:
        try:
            worker = self._ready_worker()
            worker.channel.send((task.function, task.path, task.args))
            succeeded, value = worker.channel.receive(task.timeout_s)
        except TimeoutError:
            self._dismiss()
            self._fail(task, MediaError("timeout", task.path, f"{task.timeout_s:g} s"))
        except EOFError:
            ending = _how_it_ended(self._dismiss())
            self._fail(task, MediaError("crashed", task.path, ending))
        except Exception as mistake:  # a worker that cannot start, a call that cannot be pickled
            self._dismiss()
            self._fail(task, mistake)
        else:
            if worker.calls >= self._calls_per_worker or worker.grew_beyond(self._worker_bytes):
                self._dismiss()
            if succeeded:
                task.future.set_result(value)
            else:
                task.future.set_exception(value)

    def _fail(self, task: _Task, error: BaseException) -> None:
        task.future.set_exception(CancelledError() if self._closed else error)

    def _ready_worker(self) -> _Worker:
        if self._worker is None:
            with self._lock:
                if self._closed:
                    raise CancelledError
                self._worker = _Worker(self._environment)
            try:
                self._worker.channel.receive(STARTING_S)
            except (TimeoutError, EOFError):
                raise KinemaError(
                    f"a decode worker did not start within {STARTING_S:g} s, or died",
                    hint="its own message, if it had one, is on stderr",
                ) from None
        self._worker.calls += 1
        return self._worker

    def _dismiss(self) -> int:
        """End the worker, if there is one; its exit code, that of its own death if it was dead."""
        if self._worker is None:
            return 0
        worker, self._worker = self._worker, None
        return worker.end()


@contextmanager
def _restored(mask: Iterable[int]) -> Iterator[None]:
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Worker:
    """A running worker process and the channel to it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        # Ctrl-C goes to every process of a terminal. It waits until the worker ignores it: one that
        # was still starting would end with a traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with theirs, _restored(before):
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "kinema.media.worker",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(sys.path)}
                | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment},
            )
        self.channel = Channel(ours)
        self.calls = 0

    def grew_beyond(self, limit: int) -> bool:
        try:
            return int(psutil.Process(self.process.pid).memory_info().rss) > limit
        except psutil.Error:
            return True

    def end(self) -> int:
        """Its exit code; as if killed where it cannot be ended at all."""
        self.channel.close()
        try:
            # One that died is given the moment to be dead: its own exit code says how it died.
            return self.process.wait(0.2 if self.process.poll() is None else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()
        try:
            return self.process.wait(KILLED_S)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"{signal.Signals(-code).name}: {signal.strsignal(-code)}"
