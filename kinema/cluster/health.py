"""All checks of all nodes, and a verdict of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kinema.cluster import bandwidth, clocks, gpu, gpu_checks, link_checks, node_checks, same
from kinema.cluster.clocks import Clock
from kinema.cluster.hostfile import Host
from kinema.cluster.readings import readings
from kinema.cluster.remote import Answer, ask
from kinema.cluster.ssh import Problem, Ssh
from kinema.cluster.verdict import Check, Limits, Status, listed, worst

LOOK_S = 120.0
HASH_S = 3600.0
"""For weights: some hundred GB from a busy disk."""


@dataclass(frozen=True)
class Wanted:
    """What to look at.

    Attributes:
        folder: where training runs, on the nodes.
        python: interpreter that trains, on the nodes.
        disks: folders for outputs and data.
        weights: files or folders that must be the same everywhere.
        test: of bandwidth; None: not measured.
    """

    folder: str
    python: str
    disks: tuple[str, ...]
    weights: tuple[str, ...] = ()
    test: bandwidth.Test | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass
class Health:
    """What was found.

    Attributes:
        nodes: checks by node.
        together: checks that concern no single node.
        readings: figures by node, of nodes that answered.
        looks: what `on_node/look_over.py` found, by node, of nodes that answered.
    """

    nodes: dict[str, list[Check]]
    together: list[Check] = field(default_factory=list)
    readings: dict[str, dict[str, float]] = field(default_factory=dict)
    looks: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def add(self, found: same.Found) -> None:
        """More checks of nodes."""
        for name, checks in found.items():
            self.nodes[name] += checks

    def joined(self, other: Health) -> Health:
        """The checks of both; the rest is this one's."""
        nodes = {node: [*checks, *other.nodes[node]] for node, checks in self.nodes.items()}
        return Health(nodes, [*self.together, *other.together], self.readings, self.looks)

    def verdict(self, node: str) -> Status:
        return worst(self.nodes[node])

    @property
    def statuses(self) -> list[Status]:
        """Of the nodes, and of what concerns all."""
        return [*(self.verdict(node) for node in self.nodes), worst(self.together)]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "verdict": max(self.statuses, key=("ok", "warning", "error").index),
            "nodes": {
                node: {
                    "verdict": self.verdict(node),
                    "checks": [check.as_dict() for check in checks],
                    "readings": self.readings.get(node, {}),
                }
                for node, checks in self.nodes.items()
            },
            "together": [check.as_dict() for check in self.together],
        }


Advance = Callable[[int, str], None]
"""Called with the number of steps done and what they were; 0: what begins now."""


class Examiner:
    """Looks at hosts, once or again and again.

    Args:
        done: told of each step on each node that is done.
    """

    def __init__(
        self,
        ssh: Ssh,
        hosts: Sequence[Host],
        wanted: Wanted,
        done: Advance = lambda count, note: None,
    ) -> None:
        self._ssh, self._hosts, self._wanted, self._done = ssh, list(hosts), wanted, done
        self._slots = {host.name: host.slots for host in hosts}

    def quick(self) -> Health:
        """Hardware, links, clocks, disks: what may change in a run."""
        wanted = self._wanted
        answers = self._ask(
            self._hosts,
            "look_over",
            LOOK_S,
            "python3",
            gpu=gpu.names(gpu.HEALTH_FIELDS),
            apps=gpu.app_names(),
            rows=gpu.rows_names(),
            folders=_absolute(wanted.disks, wanted.folder),
        )
        health = Health({host.name: [] for host in self._hosts})
        for answer in answers:
            name = answer.host.name
            if answer.problem is not None:
                health.nodes[name].append(_unreachable(answer.problem))
            else:
                health.looks[name] = answer.value
        apart = self._clocks(health, [h for h in self._hosts if h.name in health.looks])
        for name, look in health.looks.items():
            checks = health.nodes[name]
            checks += gpu_checks.check(look, self._slots[name], wanted.limits)
            checks += link_checks.check(look)
            checks += node_checks.check(look, wanted.limits)
            health.readings[name] = readings(look, apart.get(name))
        health.add(same.hardware(health.looks))
        return health

    def slow(self, quick: Health) -> Health:
        """Versions, weights, bandwidth: what is looked at once.

        Args:
            quick: what `quick` found; nodes that did not answer it are left out.
        """
        hosts = [host for host in self._hosts if host.name in quick.looks]
        health = Health({host.name: [] for host in self._hosts})
        health.add(self._versions(hosts))
        if self._wanted.test is not None:
            self._bandwidth(health, hosts, quick.looks)
        return health

    def _clocks(self, health: Health, hosts: Sequence[Host]) -> dict[str, Clock]:
        measured: dict[str, Clock] = {}
        for host, clock in zip(hosts, clocks.measure(self._ssh, hosts), strict=True):
            self._done(1, f"clock of {host.name}")
            if isinstance(clock, Problem):
                check = Check("clock", "warning", f"not measured: {clock.what}", cure=clock.cure)
                health.nodes[host.name].append(check)
            else:
                measured[host.name] = clock
        apart = clocks.against_the_middle(measured)
        for name, clock in apart.items():
            health.nodes[name].append(node_checks.clock(clock, self._wanted.limits))
        return apart

    def _versions(self, hosts: Sequence[Host]) -> same.Found:
        wanted = self._wanted
        time_limit = HASH_S if wanted.weights else LOOK_S
        answers = self._ask(
            hosts,
            "versions",
            time_limit,
            wanted.python,
            folder=wanted.folder,
            files=list(wanted.weights),
        )
        found = {a.host.name: a.value for a in answers if a.problem is None}
        checks = same.software(found)
        for answer in answers:
            if answer.problem is not None:
                name, value = answer.host.name, f"{wanted.python}: {answer.problem.what}"
                checks[name] = [Check("python", "error", value, cure="kinema cluster setup")]
        return checks

    def _bandwidth(
        self, health: Health, hosts: Sequence[Host], looks: Mapping[str, Mapping[str, Any]]
    ) -> None:
        test = self._wanted.test
        assert test is not None
        busy = [host.name for host in hosts if gpu_checks.in_use(looks[host.name])]
        if busy:
            value = f"not measured: programs run on GPUs of {listed(busy)}"
            cure = "once more when they are free (kinema cluster top), or --quick"
            health.together.append(Check("bandwidth", "warning", value, cure=cure))
            return
        # A node without Kinema would fail the measurement of all the others.
        able = [
            host
            for host in hosts
            if not any(
                check.status == "error" and check.name in ("python", "torch", "kinema")
                for check in health.nodes[host.name]
            )
        ]
        left_out = [host.name for host in self._hosts if host not in able]
        gpus = [len(gpu_checks.gpus_of(looks[host.name])) for host in able]
        nodes = bandwidth.nodes_of(able, gpus, [looks[h.name]["cores"] for h in able])
        if sum(node.processes for node in nodes) < 2:
            value = "not measured: one process has nobody to talk to"
            health.together.append(Check("bandwidth", "ok", value))
            return
        checks = bandwidth.examine(nodes, bandwidth.over_ssh(self._ssh, test), self._wanted.limits)
        health.together += checks.pop("")
        if left_out:
            value = f"measured without {', '.join(left_out)}: not there, or other software"
            health.together.append(Check("bandwidth nodes", "warning", value))
        health.add(checks)
        self._done(len(self._hosts), "bandwidth")

    def _ask(
        self, hosts: Iterable[Host], module: str, timeout_s: float, python: str, **given: Any
    ) -> list[Answer]:
        def one(host: Host) -> Answer:
            answer = ask(self._ssh, [host], module, timeout_s=timeout_s, python=python, **given)[0]
            self._done(1, f"{module.replace('_', ' ')} {host.name}")
            return answer

        return self._ssh.each(hosts, one)


def steps(wanted: Wanted) -> int:
    """How many steps a node takes in `Examiner.quick` and `slow` together."""
    return 3 if wanted.test is None else 4


def _unreachable(problem: Problem) -> Check:
    return Check("connection", "error", problem.what, cure=problem.cure)


def _absolute(disks: Iterable[str], folder: str) -> list[str]:
    return [
        disk if disk.startswith(("/", "~")) else f"{folder.rstrip('/')}/{disk}" for disk in disks
    ]
