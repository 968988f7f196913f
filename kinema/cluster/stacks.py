"""Python stacks of every training process, the same ones together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kinema.cluster.hostfile import Host
from kinema.cluster.remote import ask
from kinema.cluster.running import Process
from kinema.cluster.ssh import Problem, Ssh

_THREAD = re.compile(r'Thread (?:0x)?[0-9A-Fa-f]+ \([^)]*\)(?:: "(?P<name>.*)")?')
_ADDRESS = re.compile(r"0x[0-9A-Fa-f]+")
_STARTER = re.compile(r"\((typer/|kinema/cli/|<frozen runpy>)|^<module> ")
"""Outermost frames, which are the same for everything that a command starts."""
NAMED = 6
"""Processes of a group that are named."""
PTRACE = (
    "sysctl kernel.yama.ptrace_scope=0 (or py-spy as root; in a container --cap-add SYS_PTRACE)"
)


@dataclass(frozen=True)
class Dump:
    """One process's stack, as py-spy wrote it, or why there is none."""

    process: Process
    text: str = ""
    error: str = ""


@dataclass
class Group:
    """Processes with the same main thread."""

    kind: str
    frames: tuple[str, ...]
    """`function (file:line)`, the innermost first; empty where there is no stack."""
    error: str = ""
    processes: list[Process] = field(default_factory=list)


def collect(
    ssh: Ssh, hosts: Sequence[Host], *, bin_folder: str, limit_s: float, launch: str | None
) -> tuple[list[Dump], list[tuple[Host, Problem]]]:
    """Dump all processes on all hosts at once.

    Args:
        bin_folder: where py-spy is on the hosts, if not on the PATH.
        limit_s: seconds for one process.
        launch: only of this launch.

    Returns:
        The dumps, and the hosts that did not answer.
    """
    names = [h.name for h in hosts]
    answers = ask(
        ssh,
        hosts,
        "stacks",
        timeout_s=4 * limit_s + 30,
        each={name: {"host": name, "others": names} for name in names},
        bin_folder=bin_folder,
        limit_s=limit_s,
        launch=launch,
    )
    dumps = []
    for answer in answers:
        for found in answer.value["processes"] if answer.problem is None else ():
            error = found.get("error", "")
            scope = answer.value["ptrace_scope"]
            if re.search(r"permission|not permitted|EPERM", error, re.IGNORECASE):
                error = f"the kernel forbids it (ptrace_scope {scope}); {PTRACE}"
            process = Process.of(answer.host, found)
            dumps.append(Dump(process, found.get("stack", ""), error))
    return dumps, [(a.host, a.problem) for a in answers if a.problem is not None]


def group(dumps: Sequence[Dump]) -> list[Group]:
    """The same stacks together: ranks before helpers, larger groups first."""
    groups: dict[Any, Group] = {}
    for dump in dumps:
        frames = main_thread(dump.text)
        key = (dump.process.kind, frames, dump.error)
        groups.setdefault(key, Group(dump.process.kind, frames, dump.error)).processes.append(
            dump.process
        )
    return sorted(groups.values(), key=lambda g: (g.kind != "rank", -len(g.processes)))


def main_thread(text: str) -> tuple[str, ...]:
    """Frames of the main thread (of the first where none is called so).

    Numbers of processes and threads and addresses, which always differ, are left out, and so are
    the frames that lead into a command; lines are kept, because they tell one collective from
    another.
    """
    frames = next((f for name, f in _threads(text) if name == "MainThread"), None)
    if frames is None:
        frames = next((f for _, f in _threads(text)), [])
    while len(frames) > 1 and _STARTER.search(frames[-1]):
        frames.pop()
    return tuple(frames)


def _threads(text: str) -> list[tuple[str, list[str]]]:
    """Name and frames of every thread."""
    threads: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        match = _THREAD.match(line)
        if match:
            threads.append((match["name"] or "", []))
        elif threads and line.startswith("    "):
            threads[-1][1].append(_ADDRESS.sub("0x..", line.strip()))
    return threads


def render(groups: Sequence[Group]) -> str:
    """Each group with its share, its processes and its stack."""
    totals: dict[str, int] = {}
    for one in groups:
        totals[one.kind] = totals.get(one.kind, 0) + len(one.processes)
    parts = []
    for one in groups:
        what = "ranks" if one.kind == "rank" else "helpers (decode workers, watchdogs)"
        count = f"{len(one.processes)} of {totals[one.kind]} {what}"
        named = [_name(p) for p in sorted(one.processes, key=lambda p: (p.rank or 0, p.pid))]
        rest = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        body = one.frames or (f"no stack: {one.error or 'py-spy saw no Python thread'}",)
        lines = "\n".join(f"    {frame}" for frame in body)
        parts.append(f"{count}: {', '.join(named[:NAMED])}{rest}\n{lines}")
    return "\n\n".join(parts)


def _name(process: Process) -> str:
    who = "" if process.rank is None else f" rank {process.rank}"
    pid = f" pid {process.pid}" if process.kind == "helper" else ""
    return f"{process.host.name}{who}{pid}"
