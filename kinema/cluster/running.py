"""What of ours runs on all hosts, and ending it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kinema.cluster.hostfile import Host
from kinema.cluster.on_node.processes import HELPERS_END_S, KILL_S
from kinema.cluster.remote import ask
from kinema.cluster.ssh import Problem, Ssh, plain

TIMEOUT_S = 30.0
SHOWN = 100
"""Signs of a command line that are shown."""


@dataclass(frozen=True)
class Process:
    """One process of a launch."""

    host: Host
    pid: int
    launch: str
    kind: str
    """torchrun, rank or helper (decode workers, watchdogs, py-spy)."""
    rank: int | None
    state: str
    """Of /proc: R, S, T ...; D waits in the kernel and cannot be ended."""
    command: str

    @classmethod
    def of(cls, host: Host, found: dict[str, Any]) -> Process:
        """From what `on_node.processes` says."""
        command = plain(" ".join(found["command"]).replace("\n", " "))
        facts = {key: found[key] for key in ("pid", "launch", "kind", "rank", "state")}
        return cls(host, command=command, **facts)

    def __str__(self) -> str:
        kind = self.kind if self.rank is None else f"{self.kind} {self.rank}"
        if self.kind == "helper" and self.rank is not None:
            kind = f"helper of {self.rank}"
        cut = self.command if len(self.command) <= SHOWN else f"{self.command[: SHOWN - 3]}..."
        waits = "  waits in the kernel" if self.state == "D" else ""
        return f"{self.pid:>9}  {kind:<14}  {cut}{waits}"


@dataclass(frozen=True)
class Ended:
    """What became of a host's processes."""

    host: Host
    ended: int = 0
    killed: int = 0
    """Of those, how many needed SIGKILL."""
    remaining: tuple[Process, ...] = ()
    problem: Problem | None = None


def running(
    ssh: Ssh, hosts: Sequence[Host], launch: str | None
) -> tuple[list[Process], list[tuple[Host, Problem]]]:
    """Training processes of this user on all hosts, and the hosts that did not answer.

    Args:
        launch: only of this launch.
    """
    answers = ask(ssh, hosts, "processes", timeout_s=TIMEOUT_S, each=_names(hosts), launch=launch)
    found = [Process.of(a.host, p) for a in answers if a.problem is None for p in a.value]
    return found, [(a.host, a.problem) for a in answers if a.problem is not None]


def stop(
    ssh: Ssh, processes: Sequence[Process], hosts: Sequence[Host], grace_s: float
) -> list[Ended]:
    """End the launches that `processes` belong to, on the hosts where these were found.

    Args:
        hosts: all that were asked.
        grace_s: seconds between SIGTERM and SIGKILL.
    """
    found_on = [h for h in hosts if any(p.host == h for p in processes)]
    each = _names(hosts)
    for host in found_on:
        names = {p.launch for p in processes if p.host == host}
        each[host.name]["launches"] = sorted(names)
    limit = grace_s + HELPERS_END_S + KILL_S + TIMEOUT_S
    answers = ask(ssh, found_on, "stop", timeout_s=limit, each=each, grace_s=grace_s)
    return [
        Ended(a.host, problem=a.problem)
        if a.problem
        else Ended(
            a.host,
            a.value["ended"],
            len(a.value["killed"]),
            tuple(Process.of(a.host, p) for p in a.value["remaining"]),
        )
        for a in answers
    ]


def _names(hosts: Sequence[Host]) -> dict[str, dict[str, Any]]:
    """Arguments that tell a host its own name and the others'."""
    others = [h.name for h in hosts]
    return {h.name: {"host": h.name, "others": others} for h in hosts}
