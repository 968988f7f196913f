"""A rank's part of the watch: it publishes its heartbeat and answers the watchdog."""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch._C

import kinema
from kinema.media.traced import TRACER, allow_tracer
from kinema.parallel.world import World
from kinema.training.config import TrainRecipe, WatchdogConfig
from kinema.training.culprit import Limits
from kinema.training.heartbeat import END, Heartbeat
from kinema.training.stall_report import answer_path, fault_path, flight_path, nccl_path
from kinema.training.watchdog import Config, heartbeat_path

POLL_S = 0.25
WATCH = ".watch"
"""Folder of the run that watchdogs of several machines talk through."""

Decoding = Callable[[], list[tuple[int, str, float]]]


@contextmanager
def watched(
    recipe: TrainRecipe, world: World, run: Path, *, decoding: Decoding
) -> Iterator[Heartbeat | None]:
    """Publish a heartbeat while the block runs, watched by a process of this machine.

    Args:
        decoding: what decode workers are at: (process id, file, seconds).

    Yields:
        None where the recipe asks for no watchdog.
    """
    if recipe.watchdog is None:
        yield None
        return
    node, nodes, members = _nodes(world)
    leader = world.rank == members[0]
    with ExitStack() as stack:
        made = None
        if world.is_main:  # what a start that was killed has left
            shutil.rmtree(run / WATCH, ignore_errors=True)
        if leader:
            made = tempfile.mkdtemp(prefix="kinema-watch-")  # for this user alone
            stack.callback(shutil.rmtree, made, ignore_errors=True)
        folder = Path(world.gather(made)[members[0]])
        shared = run / WATCH / str(world.broadcast(folder.name))
        if leader:
            shared.mkdir(parents=True, exist_ok=True)
        if world.is_main:
            stack.callback(_remove, shared)

        heart = Heartbeat(heartbeat_path(folder, world.rank), world.rank)
        fault = stack.enter_context(fault_path(folder, world.rank).open("w"))
        faulthandler.register(signal.SIGUSR2, file=fault, all_threads=True)
        stack.callback(faulthandler.unregister, signal.SIGUSR2)
        stack.enter_context(_answering(heart, folder, world.rank, decoding))

        pids = world.gather(os.getpid())
        watchdog = None
        if leader:
            config = Config(
                parent=os.getpid(),
                node=node,
                nodes=nodes,
                host=socket.gethostname(),
                folder=str(folder),
                shared=str(shared),
                run=str(run),
                ranks=[(rank, pids[rank]) for rank in members],
                limits=limits(recipe.watchdog, decode_timeout_s=recipe.data.decode_timeout_s),
            )
            config.write(folder)
            watchdog = _start(folder)
            stack.callback(_stop, watchdog)
        tracers = world.gather(watchdog.pid if watchdog else None)
        os.environ[TRACER] = str(tracers[members[0]])  # decode workers start later
        stack.callback(os.environ.pop, TRACER, None)
        allow_tracer()
        yield heart
        heart.enter(END)


def limits(config: WatchdogConfig, *, decode_timeout_s: float) -> Limits:
    """How long a rank may go without progress; a decode worker has its own time first."""
    return Limits(step=config.timeout_s, first=config.first_step_s, data=1.25 * decode_timeout_s)


def _nodes(world: World) -> tuple[int, int, list[int]]:
    """This machine's number, how many there are, and the ranks on this one.

    torchrun says which machine a rank is on (two of its agents may share one); others are told
    apart by their host's name.
    """
    own = os.environ.get("GROUP_RANK") or socket.gethostname()
    names = world.gather(own)
    order = list(dict.fromkeys(names))
    members = [rank for rank, name in enumerate(names) if name == own]
    return order.index(own), len(order), members


def _start(folder: Path) -> subprocess.Popen[bytes]:
    package = str(Path(kinema.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "kinema.training.watchdog", str(folder)],
        stdin=subprocess.DEVNULL,
        # In a session of its own: what ends the ranks must not end it before its last word.
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([package, *sys.path])},
    )


def _stop(watchdog: subprocess.Popen[bytes]) -> None:
    watchdog.terminate()
    watchdog.wait()


def _remove(shared: Path) -> None:
    shutil.rmtree(shared, ignore_errors=True)
    with suppress(OSError):  # another start's folder is there
        shared.parent.rmdir()


@contextmanager
def _answering(heart: Heartbeat, folder: Path, rank: int, decoding: Decoding) -> Iterator[None]:
    """A thread that tells what only this process knows, when the watchdog asks."""
    done = threading.Event()

    def serve() -> None:
        answered = heart.asked
        while not done.wait(POLL_S):
            if (asked := heart.asked) != answered:
                answered = asked
                _answer(folder, rank, decoding)

    thread = threading.Thread(target=serve, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        heart.close()


def _answer(folder: Path, rank: int, decoding: Decoding) -> None:
    answer: dict[str, Any] = {"enqueued": None, "started": None, "decoding": decoding()}
    records = flight_records()
    if records:
        text = json.dumps(records, default=str, indent=1)
        flight_path(folder, rank).write_text(text, encoding="utf-8")
        answer |= progress_of(records.values())
    nccl = _dump("_dump_nccl_trace")
    if nccl is not None:
        nccl_path(folder, rank).write_bytes(nccl)
    path = answer_path(folder, rank)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(answer), encoding="utf-8")
    temporary.replace(path)


def flight_records() -> dict[str, dict[str, Any]]:
    """PyTorch's records of the last collective operations of this process, by backend: which
    began, which ended, their sizes, groups and Python stacks."""
    names = {"gloo": "_dump_fr_trace", "nccl": "_dump_nccl_trace"}
    # Pickled by this very process: nothing foreign is read.
    found = {key: pickle.loads(dump) for key, n in names.items() if (dump := _dump(n))}  # noqa: S301
    return {key: record for key, record in found.items() if record.get("entries")}


def _dump(name: str) -> bytes | None:
    """A record of PyTorch's; None where this PyTorch has none."""
    dump = getattr(getattr(torch._C, "_distributed_c10d", None), name, None)
    return None if dump is None else bytes(dump())


def progress_of(records: Iterable[Mapping[str, Any]]) -> dict[str, int | None]:
    """Collectives begun and started according to flight records, over all groups."""
    status = [one for record in records for one in record.get("pg_status", {}).values()]
    result: dict[str, int | None] = {}
    for key in ("enqueued", "started"):
        numbers = [int(one[f"last_{key}_collective"]) for one in status]
        known = [number for number in numbers if number >= 0]
        result[key] = sum(known) if known else None
    return result


class Expectation:
    """How long the work in hand should take, from how long such work took so far.

    Args:
        compiles: the first work on each bucket compiles, and says nothing of the next.
    """

    KEPT = 0.8
    """Weight of what was known; the rest is the newest."""

    def __init__(self, *, compiles: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._compiles = compiles
        self._clock = clock
        self._known: set[str] = set()
        self._rate: float | None = None  # cost per second
        self._cost = 0.0
        self._since = 0.0
        self._new = False
        self.longest_s = 0.0
        """Of all steps but the first ones."""

    def begin(self) -> None:
        """A step begins."""
        self._since, self._cost, self._new = self._clock(), 0.0, False

    def of(self, bucket: str, cost: float) -> tuple[float, bool]:
        """Seconds for a micro-batch (0: nothing is known), and whether it may take much longer."""
        first = self._rate is None or (self._compiles and bucket not in self._known)
        self._known.add(bucket)
        self._new |= first
        self._cost += cost
        return (cost / self._rate if self._rate else 0.0), first

    def end(self) -> None:
        """The step is done."""
        seconds = self._clock() - self._since
        if not self._cost or seconds <= 0:
            return
        rate = self._cost / seconds
        if self._rate is None or self._new:
            self._rate = max(rate, self._rate or 0.0)
            return
        self.longest_s = max(self.longest_s, seconds)
        self._rate = self.KEPT * self._rate + (1 - self.KEPT) * rate
