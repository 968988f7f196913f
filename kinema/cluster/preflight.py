"""Before a launch: what would fail minutes later, found in seconds and named with its node."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kinema.cluster.hostfile import Host
from kinema.cluster.plan import Meeting, Node
from kinema.cluster.remote import Answer, ask, call
from kinema.cluster.shared_disk import first_with_it
from kinema.cluster.ssh import Problem, Ssh, require
from kinema.config.errors import KinemaError

MIN_FREE = 5 * 2**30
"""Bytes of disk below which a run is not begun."""
TIMEOUT_S = 60.0
SETUP = "kinema cluster setup"


def look(
    ssh: Ssh, hosts: Sequence[Host], *, python: str, folder: str, paths: Sequence[str], disk: str
) -> list[dict[str, Any]]:
    """What each host has (`on_node.inspect_node`), if all have what training needs.

    Args:
        python: interpreter on the hosts.
        folder: where it will run there.
        paths: what it will read.
        disk: where it will write.

    Raises:
        KinemaError: every host that cannot be reached, lacks something or differs.
    """
    answers = ask(
        ssh,
        hosts,
        "inspect_node",
        timeout_s=TIMEOUT_S,
        python=python,
        folder=folder,
        paths=list(paths),
        disk=disk,
    )
    require([(a.host, a.problem) for a in answers], "do not answer")
    require([(a.host, _lack(a, folder, disk)) for a in answers], "are not ready")
    differ = differences({a.host.name: a.value for a in answers})
    require([(h, differ.get(h.name)) for h in hosts], "differ from the others")
    return [a.value for a in answers]


def _lack(answer: Answer, folder: str, disk: str) -> Problem | None:
    found = answer.value
    for name, version in found["versions"].items():
        if version is None:
            return Problem(f"{name} is not installed", SETUP)
    if not found["folder"]:
        return Problem(f"there is no folder {folder}", "make it, or --cwd")
    if found["missing"]:
        missing = ", ".join(found["missing"])
        return Problem(f"lacks {missing}", "kinema cluster sync weights PATH, or a shared disk")
    if not found["writable"]:
        return Problem(f"may not write to {disk}", "another --outputs")
    if found["free"] < MIN_FREE:
        return Problem(
            f"{found['free'] / 2**30:.1f} GiB free for {disk}; training needs "
            f"{MIN_FREE / 2**30:.0f} to begin",
            "free some, or another --outputs",
        )
    return None


def differences(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Problem]:
    """Hosts whose Python, torch, Kinema or code are not what most have."""
    problems: dict[str, Problem] = {}
    facts = {
        "Python": lambda f: f["python"],
        "torch": lambda f: f["versions"]["torch"],
        "kinema": lambda f: f["versions"]["kinema"],
        "kinema's code": lambda f: f["code"],
    }
    for name, fact in facts.items():
        values = {host: str(fact(f)) for host, f in found.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        for host, value in values.items():
            if value != usual and host not in problems:
                problems[host] = Problem(f"{name} is {value}; most have {usual}", SETUP)
    return problems


def without_the_disk(
    ssh: Ssh, hosts: Sequence[Host], *, python: str, folder: str, disk: str
) -> list[str]:
    """Hosts that do not see what the first one writes to `disk`.

    Args:
        python: interpreter on the hosts.
        folder: where training will run.
        disk: where it will write, relative to `folder` if not absolute.
    """
    owners = first_with_it(ssh, hosts, os.path.join(folder, disk), python=python)
    return [name for name, owner in owners.items() if owner != hosts[0].name]


def processes_on(
    hosts: Sequence[Host], found: Sequence[Mapping[str, Any]], asked: int | None
) -> list[Node]:
    """How many ranks each host gets: as asked, else its slots, else its GPUs.

    Raises:
        KinemaError: hosts for which none of these says anything.
    """
    nodes = [
        Node(host, asked or host.slots or facts["gpus"], facts["cores"])
        for host, facts in zip(hosts, found, strict=True)
    ]
    none = Problem("has no GPU, and slots= does not say how many processes", "--nproc-per-node")
    require([(n.host, None if n.processes else none) for n in nodes], "would run nothing")
    return nodes


def meet(
    ssh: Ssh, nodes: Sequence[Node], *, python: str, address: str | None, port: int
) -> tuple[Meeting, list[Node]]:
    """Find a free port on the first node and let all others connect to it.

    Args:
        address: of the first node as the others see it; None: as ssh's configuration has it.
        port: 0: a free one.

    Returns:
        Where they meet, and the nodes with their addresses on that way.

    Raises:
        KinemaError: the port is taken, or nodes do not get through.
    """
    first, others = nodes[0], nodes[1:]
    if address is None:
        address = ssh.address(first.host) if others else "127.0.0.1"
    command, text = call("meeting", {"port": port}, python=python, limit_s=int(TIMEOUT_S))
    listener = ssh.start(first.host, command)
    try:
        free = _port(listener, text, first.host)
        answers = ask(
            ssh,
            [node.host for node in others],
            "meeting",
            timeout_s=TIMEOUT_S,
            python=python,
            address=address,
            port=free,
        )
    finally:
        listener.kill()
        listener.wait()
    checked = []
    for answer in answers:
        problem = answer.problem
        if problem is None and "error" in answer.value:
            problem = Problem(
                f"does not reach {first.host.name} at {address}:{free} ({answer.value['error']})",
                "--address of it in the nodes' own network; open the port, or --port",
            )
        checked.append((answer.host, problem))
    require(checked, "cannot meet the first")
    ways = [a.value for a in answers]
    if ways:
        first = replace(first, address=ways[0]["remote"])
    joined = [replace(n, address=way["local"]) for n, way in zip(others, ways, strict=True)]
    return Meeting(address, free), [first, *joined]


def _port(listener: subprocess.Popen[bytes], text: bytes, host: Host) -> int:
    assert listener.stdin is not None
    assert listener.stdout is not None
    alarm = threading.Timer(TIMEOUT_S, listener.kill)
    alarm.start()
    try:
        with suppress(BrokenPipeError):
            listener.stdin.write(text)
            listener.stdin.flush()
        line = listener.stdout.readline()
    finally:
        alarm.cancel()
    said = json.loads(line) if line else {"error": "does not answer any more"}
    if "error" in said:
        raise KinemaError(said["error"], where=host.name, hint="another --port, or leave it out")
    return int(said["port"])
