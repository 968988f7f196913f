"""What the nodes are doing now: GPUs, processes on them, load."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Self

from kinema.cluster import gpu
from kinema.cluster.gpu import Gpu, UnreadableError
from kinema.cluster.hostfile import Host
from kinema.cluster.session import LostError, Session
from kinema.cluster.ssh import Problem, Ssh, plain

RETRY_S = 15.0
"""Before a host that was lost is tried again."""


@dataclass(frozen=True)
class Process:
    """One process on a node.

    Attributes:
        gpu: index of the GPU that it is on; None: on none.
        gpu_memory, memory: bytes there and of main memory; None where nobody says.
        cpu_percent: of one core, since the last reading.
        rank, launch, run, recipe: of a training process of Kinema's; None for others.
        ours: it is a training process.
    """

    pid: int
    user: str
    command: str
    gpu: int | None
    gpu_memory: float | None
    memory: float | None
    cpu_percent: float | None
    ours: bool
    rank: int | None = None
    launch: str | None = None
    run: str | None = None
    recipe: str | None = None


@dataclass(frozen=True)
class NodeUse:
    """One node now.

    Attributes:
        problem: why it is not known; all else is empty then.
        note: what of it could not be read.
        cpu_percent: of all cores.
        memory_total, memory_used: of main memory, bytes.
    """

    name: str
    problem: str | None = None
    note: str | None = None
    gpus: tuple[Gpu, ...] = ()
    processes: tuple[Process, ...] = ()
    load: float | None = None
    cores: int | None = None
    cpu_percent: float | None = None
    memory_total: float | None = None
    memory_used: float | None = None

    def mean(self, field: str) -> float | None:
        """Over the GPUs that say it."""
        values = [v for one in self.gpus if (v := getattr(one, field)) is not None]
        return sum(values) / len(values) if values else None

    def total(self, field: str) -> float | None:
        """Over the GPUs that say it."""
        values = [v for one in self.gpus if (v := getattr(one, field)) is not None]
        return sum(values) if values else None

    @property
    def slowed(self) -> dict[int, tuple[str, ...]]:
        """GPU -> why its clock is held down."""
        return {one.index: one.slowed for one in self.gpus if one.slowed}

    def as_dict(self) -> dict[str, Any]:
        """JSON values; energy in watts, memory in bytes."""
        if self.problem is not None:
            return {"name": self.name, "problem": self.problem}
        found = asdict(self)
        for one in found["gpus"]:
            del one["values"]
        return found | {
            "mean_power_w": self.mean("power_w"),
            "total_power_w": self.total("power_w"),
            "mean_utilisation_percent": self.mean("utilisation_percent"),
        }


def as_dict(nodes: Sequence[NodeUse]) -> dict[str, Any]:
    """All nodes as JSON values, with the power of all."""
    powers = [power for node in nodes if (power := node.total("power_w")) is not None]
    means = [node.mean("power_w") for node in nodes]
    known = [mean for mean in means if mean is not None]
    return {
        "nodes": [node.as_dict() for node in nodes],
        "total_power_w": sum(powers) if powers else None,
        "mean_power_w": sum(known) / len(known) if known else None,
        "gpus": sum(len(node.gpus) for node in nodes),
    }


class Watch:
    """Connections to all hosts, read again and again::

        with Watch(ssh, hosts) as watch:
            nodes = watch.read()  # once, waiting for all
            watch.follow(every_s=2)
            nodes = watch.latest()  # at any time, waiting for none

    Args:
        timeout_s: that a host has for an answer.
        stale_s: after which a missing answer is mentioned.
    """

    def __init__(
        self, ssh: Ssh, hosts: Sequence[Host], *, timeout_s: float = 30, stale_s: float = 5
    ) -> None:
        self._ssh, self._hosts = ssh, list(hosts)
        self._timeout_s, self._stale_s = timeout_s, stale_s
        self._sessions: dict[str, Session] = {}
        self._lost: dict[str, tuple[float, Problem]] = {}
        self._latest: dict[str, tuple[float, NodeUse]] = {}
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def read(self) -> list[NodeUse]:
        """Every node, in the order of the hosts. A host that is lost is tried again later."""
        return self._ssh.each(self._hosts, self._one)

    def follow(self, every_s: float) -> None:
        """Read each host on its own from now on: one that hangs holds up no other."""
        now = time.monotonic()
        for host in self._hosts:
            self._latest[host.name] = now, NodeUse(host.name, note="asking …")
            thread = threading.Thread(target=self._follow, args=(host, every_s), daemon=True)
            self._threads.append(thread)
            thread.start()

    def latest(self) -> list[NodeUse]:
        """What is known of every node, in the order of the hosts; old news are marked."""
        found = []
        for host in self._hosts:
            when, node = self._latest[host.name]
            age = time.monotonic() - when
            if node.problem is None and age > self._stale_s:
                node = replace(node, note=f"no answer for {age:.0f} s")
            found.append(node)
        return found

    def _follow(self, host: Host, every_s: float) -> None:
        while not self._stop.is_set():
            node = self._one(host)
            self._latest[host.name] = time.monotonic(), node
            self._stop.wait(every_s)

    def _one(self, host: Host) -> NodeUse:
        when, problem = self._lost.get(host.name, (0.0, Problem("")))
        if problem.what and time.monotonic() - when < RETRY_S:
            return NodeUse(host.name, problem=str(problem))
        try:
            session = self._sessions.get(host.name)
            if session is None:
                session = self._sessions[host.name] = Session(self._ssh, host, "use")
            others = [other.name for other in self._hosts]
            question = {
                "gpu": gpu.names(gpu.USE_FIELDS),
                "apps": gpu.app_names(),
                "host": host.name,
                "others": others,
            }
            said = session.ask(question, timeout_s=self._timeout_s)
        except LostError as error:
            self._sessions.pop(host.name).close()
            self._lost[host.name] = time.monotonic(), error.problem
            return NodeUse(host.name, problem=str(error.problem))
        self._lost.pop(host.name, None)
        return understand(host.name, said)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for session in list(self._sessions.values()):
            session.end()
        for thread in self._threads:
            thread.join(5)
        for session in list(self._sessions.values()):
            session.close()


def understand(name: str, said: dict[str, Any]) -> NodeUse:
    """A node from what `on_node/use.py` answered."""
    note: str | None = None
    gpus: list[Gpu] = []
    apps: list[gpu.App] = []
    problem = said["gpu"]["problem"]
    if problem is None:
        try:
            gpus = gpu.gpus(said["gpu"])
            if said["apps"]["problem"] is None:
                apps = gpu.apps(said["apps"], said["listing"])
        except UnreadableError as error:
            note = f"nvidia-smi {error}"
    elif problem != "not installed":
        note = f"nvidia-smi {problem}"
    memory = said["memory"] or (None, None)
    return NodeUse(
        name,
        note=note,
        gpus=tuple(gpus),
        processes=tuple(_processes(gpus, apps, said["processes"])),
        load=said["load"],
        cores=said["cores"],
        cpu_percent=said["cpu_percent"],
        memory_total=memory[0],
        memory_used=memory[1],
    )


def _processes(
    gpus: Sequence[Gpu], apps: Sequence[gpu.App], found: Sequence[dict[str, Any]]
) -> list[Process]:
    """What is on the GPUs, with what the node knows of it; then trainings that are on none."""
    index = {one.uuid: one.index for one in gpus}
    known = {process["pid"]: process for process in found}
    processes = [
        _process(known.get(app.pid, {"pid": app.pid}), app.name, index.get(app.uuid), app.memory)
        for app in apps
    ]
    on_gpus = {app.pid for app in apps}
    processes += [
        _process(one, one["command"], None, None)
        for one in found
        if one["pid"] not in on_gpus and one["training"] and not one["helper"]
    ]
    return sorted(processes, key=lambda p: (p.gpu is None, p.gpu or 0, p.rank or 0, p.pid))


def _process(
    one: dict[str, Any], name: str, index: int | None, gpu_memory: float | None
) -> Process:
    return Process(
        pid=one["pid"],
        user=plain(one.get("user", "?")),  # in a container of its own: only the driver sees it
        command=plain(one.get("command") or name),
        gpu=index,
        gpu_memory=gpu_memory,
        memory=one.get("memory"),
        cpu_percent=one.get("cpu_percent"),
        ours=bool(one.get("training")),
        rank=one.get("rank"),
        launch=one.get("launch"),
        run=one.get("run"),
        recipe=one.get("recipe"),
    )
