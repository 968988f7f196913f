"""Environment variables of training processes: defaults, and what a person asks for.

docs/cluster.md says where each default comes from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kinema.config.errors import KinemaError

RANK_PREFIX = "[rank${rank}]: "
"""torchrun puts it before each line of a rank's output; logs are told apart by it."""
STOP_S = 300
"""Seconds that torchrun gives ranks, told to stop, to finish their step and write a checkpoint."""

DEFAULTS: dict[str, str] = {
    # Forked decode workers and the tokenizers' own threads lock each other up.
    "TOKENIZERS_PARALLELISM": "false",
    # Logs are files and pipes, where Python would hold lines back.
    "PYTHONUNBUFFERED": "1",
    # A failed collective ends the process; taking communicators down first may hang.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # The flight recorder: the last collectives of each rank, and a dump when one times out.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # Buckets of many sizes would leave holes in a GPU's memory.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(STOP_S),
}


def threads(cores: int, processes: int) -> str:
    """OMP_NUM_THREADS: a node's cores, shared out among its processes."""
    return str(max(1, cores // processes))


def network(ib_hca: str | None, interface: str | None) -> dict[str, str]:
    """Variables of the network.

    Args:
        ib_hca: InfiniBand adapters, by comma: `mlx5_0,mlx5_1`.
        interface: Ethernet interface over which processes find each other, and gloo talks.

    Raises:
        KinemaError: a name that is none.
    """
    chosen = {}
    if ib_hca is not None:
        if not re.fullmatch(r"[\w:-]+(,[\w:-]+)*", ib_hca.removeprefix("=")):
            raise KinemaError(f"{ib_hca!r} are no adapters", hint="--ib-hca mlx5_0,mlx5_1")
        # Without the `=` NCCL takes a name as the beginning of names: mlx5_1 is mlx5_10 as well.
        chosen["NCCL_IB_HCA"] = "=" + ib_hca.removeprefix("=")
    if interface is not None:
        if not re.fullmatch(r"[\w.@-]+", interface):
            raise KinemaError(f"{interface!r} is no interface", hint="--interface eth0")
        chosen |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return chosen


def asked_for(words: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` words as a mapping.

    Raises:
        KinemaError: a word that is none.
    """
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise KinemaError(f"{word!r} sets nothing", hint="--env NCCL_DEBUG=INFO")
        given[key] = value
    return checked(given, "--env")


# A recipe is data: what makes programs load code from elsewhere is the person's to say.
_LOADS_CODE = re.compile(
    r"D?Y?LD_.*|PATH|BASH_ENV|ENV|PYTHON(?!UNBUFFERED$|HASHSEED$|FAULTHANDLER$).*|.*_PLUGIN\w*"
)


def of_recipe(variables: Mapping[str, str]) -> dict[str, str]:
    """A recipe's variables.

    Raises:
        KinemaError: a name that is none, or one that would load code.
    """
    where = "the recipe's environment"
    for key in variables:
        if _LOADS_CODE.fullmatch(key):
            raise KinemaError(
                f"{key} decides what programs load, which no recipe may",
                where=where,
                hint=f"leave it out; --env {key}=... if you want it",
            )
    return checked(variables, where)


def checked(variables: Mapping[str, str], where: str) -> dict[str, str]:
    """The same variables.

    Raises:
        KinemaError: a name that no shell would take, or a value that no process can have.
    """
    for key, value in variables.items():
        if "\0" in value:
            raise KinemaError(f"{key} has a zero byte in it", where=where)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise KinemaError(f"{key!r} is no name of an environment variable", where=where)
    return dict(variables)
