"""What a launch runs: on which host, with which words and variables. Plain values and text."""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kinema.cluster.environment import DEFAULTS, RANK_PREFIX, threads
from kinema.cluster.hostfile import Host
from kinema.cluster.on_node.processes import HOST_MARK, MARK
from kinema.cluster.ssh import quoted


@dataclass(frozen=True)
class Job:
    """What is to be trained, the same on all hosts.

    Attributes:
        train: words after `kinema`: `("train", "speedrun/stage1", "--data-path", "M")`.
        name: of this launch; marks its processes and names its logs.
        folder: where it runs, on every host.
        python: interpreter of the environment that Kinema is installed in, on every host.
        environment: variables besides the defaults; they win.
        max_restarts: how often torchrun starts all ranks anew after one has failed.
    """

    train: tuple[str, ...]
    name: str
    folder: str
    python: str
    environment: dict[str, str]
    max_restarts: int = 3

    @property
    def program(self) -> list[str]:
        """What each rank runs."""
        return [str(Path(self.python).with_name("kinema")), *self.train]


@dataclass(frozen=True)
class Node:
    """A host's part of a launch.

    Attributes:
        processes: ranks on it.
        cores: that they share; None where nobody counted.
        address: that other nodes reach it by; None: torchrun finds one.
    """

    host: Host
    processes: int
    cores: int | None = None
    address: str | None = None


@dataclass(frozen=True)
class Meeting:
    """Where the nodes' torchruns meet: on the first node."""

    address: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


def new_name() -> str:
    """A name for a launch, unlike any other's."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def torchrun(
    job: Job, nodes: Sequence[Node], index: int, meeting: Meeting, *, logs: str | None
) -> list[str]:
    """The words that start one node's ranks.

    Args:
        logs: folder for each rank's output, which is shown as well; None: shown only.
    """
    node = nodes[index]
    words = [job.python, "-m", "torch.distributed.run"]
    words += [f"--nnodes={len(nodes)}", f"--nproc-per-node={node.processes}"]
    words += ["--rdzv-backend=c10d", f"--rdzv-id={job.name}"]
    words += [f"--rdzv-endpoint={meeting}"]
    # Said, not guessed from names: a node that does not know its own name would wait for nobody.
    words += [f"--rdzv-conf=is_host={'true' if index == 0 else 'false'}"]
    words += [f"--local-addr={node.address}"] if node.address else []
    words += [f"--max-restarts={job.max_restarts}"]
    words += ["--log-dir", logs, "--tee=3"] if logs else []
    return [*words, "--no-python", *job.program]


def environment(job: Job, node: Node) -> dict[str, str]:
    """The variables of one node's processes, the defaults among them."""
    counted = {} if node.cores is None else {"OMP_NUM_THREADS": threads(node.cores, node.processes)}
    marks = {
        MARK: job.name,
        HOST_MARK: node.host.name,
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": RANK_PREFIX,
    }
    return DEFAULTS | counted | job.environment | marks


def as_text(job: Job, nodes: Sequence[Node], meeting: Meeting) -> str:
    """A line for a shell per node, under the node's name."""
    lines = []
    for index, node in enumerate(nodes):
        lines.append(
            f"# on {node.host.name}: {node.processes} process{'es' if node.processes > 1 else ''}"
        )
        variables = " ".join(f"{k}={shlex.quote(v)}" for k, v in environment(job, node).items())
        words = quoted(torchrun(job, nodes, index, meeting, logs=None))
        lines.append(f"cd {shlex.quote(job.folder)} && {variables} {words}")
    return "\n".join(lines)
