"""Which machines there are: a hostfile, or the nodes of a Slurm job.

One host a line, as other launchers have it:

    # name   processes (GPUs)   if they differ from ~/.ssh/config
    node1    slots=8
    node2    slots=8 user=trainer port=2222
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kinema.cluster.slurm_nodes import expand_nodes
from kinema.config.errors import KinemaError

DEFAULT = Path("nodes.txt")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Host:
    """One machine.

    Attributes:
        name: as it is written in the hostfile and as OpenSSH is asked for it.
        slots: training processes that it takes (its GPUs); None: as many as it has GPUs.
        user, port: None: as `~/.ssh/config` has them.
    """

    name: str
    slots: int | None = None
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        return self.name


def find_hosts(
    hostfile: Path | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Host]:
    """The hosts of a hostfile; without one, of the Slurm job; else of `nodes.txt` here.

    Args:
        hostfile: None: a Slurm job's nodes if this runs in one, else `nodes.txt`.
        include: only these hosts.
        exclude: all but these.
        environment: where Slurm's variables are looked for; of this process by default.

    Raises:
        KinemaError: no such file, a wrong line, a name that is in no line, or no host left.
    """
    environment = os.environ if environment is None else environment
    if hostfile is None and "SLURM_JOB_NODELIST" in environment:
        hosts, where = _slurm_hosts(environment), "the Slurm job's nodes"
    else:
        path = hostfile or DEFAULT
        hosts, where = read_hostfile(path), str(path)
    known = {host.name for host in hosts}
    for name in (*include, *exclude):
        if name not in known:
            listed = ", ".join(sorted(known))
            raise KinemaError(f"has no host {name!r}; it has {listed}", where=where)
    chosen = [h for h in hosts if (not include or h.name in include) and h.name not in exclude]
    if not chosen:
        raise KinemaError("no host is left", where=where, hint="--include and --exclude less")
    return chosen


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in its order.

    Raises:
        KinemaError: no such file, or a line that is wrong, with its number.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise KinemaError(
            "no such hostfile",
            where=str(path),
            hint="write one host a line (`node1 slots=8`), or name a file with --hostfile",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise KinemaError(f"cannot be read as text: {error}", where=str(path)) from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            host = parse_host(words)
            if host.name in hosts:
                raise ValueError(f"{host.name} is listed twice")
        except ValueError as error:
            raise KinemaError(
                str(error), where=f"{path}:{number}", hint="one host a line: node1 slots=8"
            ) from None
        hosts[host.name] = host
    if not hosts:
        raise KinemaError("lists no host", where=str(path), hint="one host a line: node1 slots=8")
    return list(hosts.values())


def parse_host(words: Sequence[str]) -> Host:
    """A host from the words of a line: `[user@]name`, then `slots=`, `user=`, `port=`.

    Raises:
        ValueError: a word that is wrong.
    """
    user, _, name = words[0].rpartition("@")
    # A name that began with a minus sign would be an option of ssh's.
    if not _NAME.fullmatch(name):
        raise ValueError(f"{words[0]!r} is no name of a host")
    host = Host(name)
    given = {"user": user} if user else {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or key not in ("slots", "user", "port"):
            raise ValueError(f"{word!r} is not known; it may be slots=N, user=NAME or port=N")
        if key in given:
            raise ValueError(f"{key} is given twice")
        given[key] = value
    for key, value in given.items():
        if key == "user":
            if not _USER.fullmatch(value):
                raise ValueError(f"{value!r} is no name of a user")
            host = replace(host, user=value)
        elif not value.isdecimal() or not 1 <= int(value) <= (65535 if key == "port" else 1024):
            raise ValueError(f"{key}={value} is not possible")
        elif key == "port":
            host = replace(host, port=int(value))
        else:
            host = replace(host, slots=int(value))
    return host


def _slurm_hosts(environment: Mapping[str, str]) -> list[Host]:
    # https://slurm.schedmd.com/sbatch.html, "output environment variables"
    count = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_NTASKS_PER_NODE") or ""
    slots = int(count) if count.isdecimal() and int(count) > 0 else None
    return [Host(name, slots) for name in expand_nodes(environment["SLURM_JOB_NODELIST"])]
