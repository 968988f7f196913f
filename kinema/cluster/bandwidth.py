"""Runs `python -m kinema.parallel.bandwidth` over all nodes, and finds the one that is slow."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

from kinema.cluster import preflight
from kinema.cluster.environment import DEFAULTS, threads
from kinema.cluster.hostfile import Host
from kinema.cluster.on_node.agent import MARK as REPORT
from kinema.cluster.on_node.processes import HOST_MARK, MARK
from kinema.cluster.plan import Meeting, Node, new_name
from kinema.cluster.remote import call
from kinema.cluster.ssh import SSH_FAILED, Ssh, explain
from kinema.cluster.verdict import Check, Limits, listed, worst
from kinema.config.errors import KinemaError

ROUNDS = 5
"""Partners that each node is timed with."""
TOGETHER_S = 20.0
"""Between the ends of the nodes' processes."""
END_S = 15.0
"""For a node to end what it started, after it was told."""
NETWORK_CURE = (
    "cable, switch port and NIC of this node (infiniband and ethernet checks); then run it with "
    "--env NCCL_DEBUG=INFO"
)


@dataclass(frozen=True)
class Test:
    """How the nodes' bandwidth is measured.

    Attributes:
        python: interpreter with Kinema, on the nodes.
        folder: where it runs.
        environment: variables besides launch's defaults.
        sizes: bytes as `64K,1M,1G`; None: as fits the device.
        timeout_s: for one measurement.
    """

    python: str
    folder: str
    environment: dict[str, str]
    sizes: str | None = None
    timeout_s: float = 180


@dataclass(frozen=True)
class Found:
    """A measurement: `result` as `kinema.parallel.bandwidth` prints it, or why there is none."""

    nodes: tuple[str, ...]
    result: dict[str, Any] | None
    failure: str = ""


Measure = Callable[[Sequence[Node], int], Found]
"""Measures some nodes, the second argument being how many partners each is timed with."""


def examine(nodes: Sequence[Node], measure: Measure, limits: Limits) -> dict[str, list[Check]]:
    """Measure all together; if that fails, look for the node that is the reason.

    A node is slow if it is slow in two measurements.

    Args:
        nodes: two at least, or one with several processes.

    Returns:
        Checks by node; those of all nodes together under "".
    """
    rounds = ROUNDS if len(nodes) > 2 else 0
    found = measure(nodes, rounds)
    if found.result is None:
        return locate(nodes, measure, found.failure)
    checks = judge(found, limits)
    if any(worst(checks[name]) != "ok" for name in checks if name):
        # Something else on the node or in the network may have been in the way for a moment.
        again = measure(nodes, rounds)
        if again.result is not None:
            found.result["pairs"] += again.result["pairs"]
            checks = judge(found, limits)
    return checks


def judge(found: Found, limits: Limits) -> dict[str, list[Check]]:
    """Checks from a measurement that came to its end."""
    result = found.result
    assert result is not None
    largest = result["sizes"][-1]
    count = len(found.nodes)
    who = f"{result['processes']} processes on {count} node{'s' if count > 1 else ''}"
    value = f"{largest['bus_gb_s']:.2f} GB/s bus bandwidth at {_size(largest['bytes'])}, {who}"
    wrong = [one for one in result["sizes"] if not one["correct"]]
    if wrong:
        cure = "leave nodes out with --exclude until the sums are right; GPU memory, NIC firmware"
        everyone = Check("bandwidth", "error", f"wrong sums; {value}", "right sums", cure)
    else:
        everyone = Check("bandwidth", "ok", f"{value} ({result['backend']})")
    checks: dict[str, list[Check]] = {"": [everyone]}
    # With a good partner a good node is fast, a slow one is slow with everybody.
    best: dict[str, float] = {}
    for pair in result["pairs"]:
        names = [found.nodes[index] for index in pair["nodes"]]
        for name in names:
            best[name] = max(best.get(name, 0.0), pair["bus_gb_s"])
        if not pair["correct"]:
            for name in names:
                value = f"wrong sums between {' and '.join(names)}"
                bad = Check("bandwidth in pairs", "error", value, "right sums", NETWORK_CURE)
                checks.setdefault(name, []).append(bad)
    usual = median(best.values()) if best else 0.0
    for name, speed in best.items():
        slow = speed < limits.bandwidth_part * usual
        value = f"{speed:.2f} GB/s with its best partner"
        limit = f"{limits.bandwidth_part:g} × {usual:.2f} GB/s, the median of the nodes"
        check = Check(
            "bandwidth in pairs",
            "error" if slow else "ok",
            value,
            limit,
            NETWORK_CURE if slow else "",
        )
        checks.setdefault(name, []).append(check)
    return checks


def locate(nodes: Sequence[Node], measure: Measure, failure: str) -> dict[str, list[Check]]:
    """Why all together fail: pairs that work clear their nodes, the others are tried with those.

    Args:
        failure: of all together.
    """
    cure = "measure fewer nodes, more each time: kinema cluster health --include node1,node2,..."
    whole = Check("bandwidth", "error", f"not measured: {failure}", cure=NETWORK_CURE)
    checks: dict[str, list[Check]] = {"": [whole]}
    if len(nodes) < 3:
        return checks
    pairs = [list(nodes[at : at + 2]) for at in range(0, len(nodes), 2)]
    tried = [pair for pair in pairs if len(pair) == 2]
    good = [node for pair in tried if measure(pair, 0).result is not None for node in pair]
    if not good:
        return checks
    for node in nodes:
        if node in good:
            continue
        found = measure([good[0], node], 0)
        if found.result is None:
            value = f"fails with {good[0].host.name}, which works with others: {found.failure}"
            checks[node.host.name] = [Check("bandwidth", "error", value, cure=NETWORK_CURE)]
    if len(checks) == 1:
        names = listed([node.host.name for node in good])
        value = f"not measured over all nodes, though pairs work (such as {names}): {failure}"
        checks[""] = [Check("bandwidth", "error", value, cure=cure)]
    return checks


def over_ssh(ssh: Ssh, test: Test) -> Measure:
    """The real measurement: torchrun on every node, ended together."""

    def measure(nodes: Sequence[Node], rounds: int) -> Found:
        names = tuple(node.host.name for node in nodes)
        try:
            meeting, joined = preflight.meet(ssh, nodes, python=test.python, address=None, port=0)
        except KinemaError as error:
            return Found(names, None, " ".join(str(error).split()))
        return _Run(ssh.alone(), test, joined, meeting, rounds).run()

    return measure


def nodes_of(hosts: Sequence[Host], gpus: Sequence[int], cores: Sequence[int | None]) -> list[Node]:
    """The hosts, each with its slots, else its GPUs, else one process."""
    return [
        Node(host, host.slots or count or 1, core)
        for host, count, core in zip(hosts, gpus, cores, strict=True)
    ]


class _Run:
    """One torchrun per node, from start to end."""

    def __init__(
        self, ssh: Ssh, test: Test, nodes: Sequence[Node], meeting: Meeting, rounds: int
    ) -> None:
        self._ssh, self._test, self._nodes = ssh, test, nodes
        self._meeting, self._rounds = meeting, rounds
        self._name = f"bandwidth-{new_name()}"
        self._said: dict[str, list[str]] = {node.host.name: [] for node in nodes}

    def run(self) -> Found:
        names = tuple(node.host.name for node in self._nodes)
        lines = [self._start(index) for index in range(len(self._nodes))]
        readers = [
            threading.Thread(target=self._read, args=(line, text, node.host), daemon=True)
            for (line, text), node in zip(lines, self._nodes, strict=True)
        ]
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + self._test.timeout_s
        while any(reader.is_alive() for reader in readers) and time.monotonic() < deadline:
            time.sleep(0.1)
            if not all(reader.is_alive() for reader in readers):
                # They end together; if one fails, the others would wait for it in vain.
                deadline = min(deadline, time.monotonic() + TOGETHER_S)
        late = any(reader.is_alive() for reader in readers)
        for line, _ in lines:
            with suppress(OSError):
                if late and line.stdin is not None:
                    line.stdin.write(b"kill\n")
                    line.stdin.flush()
        for reader in readers:
            reader.join(END_S)
        for line, _ in lines:
            line.kill()
            line.wait()
        found = [text for said in self._said.values() for text in said if text.startswith("{")]
        if found:
            return Found(names, json.loads(found[-1]))
        return Found(names, None, self._why())

    def _start(self, index: int) -> tuple[subprocess.Popen[bytes], bytes]:
        node, test = self._nodes[index], self._test
        words = [test.python, "-m", "torch.distributed.run", f"--nnodes={len(self._nodes)}"]
        # Fixed places, so that numbers of nodes in the result are those of this list.
        words += [f"--node-rank={index}", f"--nproc-per-node={node.processes}"]
        words += [f"--master-addr={self._meeting.address}", f"--master-port={self._meeting.port}"]
        words += ["-m", "kinema.parallel.bandwidth", "--json", f"--pairs={self._rounds}"]
        words += [f"--timeout={test.timeout_s:g}"]
        words += [f"--sizes={test.sizes}"] if test.sizes else []
        shared = {}
        if node.cores is not None:
            shared["OMP_NUM_THREADS"] = threads(node.cores, node.processes)
        marks = {MARK: self._name, HOST_MARK: node.host.name}
        arguments = {
            "host": node.host.name,
            "others": [other.host.name for other in self._nodes],
            "launch": self._name,
            "command": words,
            "environment": DEFAULTS | shared | test.environment | marks,
            "folder": test.folder,
            "grace_s": 5,
        }
        command, text = call("agent", arguments, python=test.python)
        return self._ssh.start(node.host, command), text

    def _read(self, line: subprocess.Popen[bytes], text: bytes, host: Host) -> None:
        assert line.stdin is not None
        assert line.stdout is not None
        with suppress(OSError):
            line.stdin.write(text)
            line.stdin.flush()
        said = self._said[host.name]
        for raw in line.stdout:
            shown = raw.decode(errors="replace").strip()
            if shown and not shown.startswith(REPORT.strip()):
                said.append(shown)
        if line.wait() == SSH_FAILED:
            assert line.stderr is not None
            stderr = line.stderr.read().decode(errors="replace")
            said.append(f"error: {explain(stderr, host)}")

    def _why(self) -> str:
        """The line that says most, of all that the nodes said."""
        for sign in ("error: ", "Error: ", "Error"):
            for name, said in self._said.items():
                telling = [text for text in said if sign in text]
                if telling:
                    return f"{name} says: {telling[0][:300]}"
        last = [f"{name} says last: {said[-1][:200]}" for name, said in self._said.items() if said]
        return "; ".join(["no result in time", *last])


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:g} {name}"
    return f"{count} B"
