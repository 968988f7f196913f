"""Options that every command of `kinema cluster` shares: which hosts, and how to reach them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kinema.cluster.hostfile import Host
    from kinema.cluster.ssh import Ssh

PANEL = "Hosts"
Hostfile = Annotated[
    Path | None,
    typer.Option(
        help="One host a line: `node1 slots=8`. Default: the Slurm job's nodes, or nodes.txt here.",
        rich_help_panel=PANEL,
    ),
]
Include = Annotated[
    str | None, typer.Option(help="Only these hosts: node1,node2.", rich_help_panel=PANEL)
]
Exclude = Annotated[str | None, typer.Option(help="All but these.", rich_help_panel=PANEL)]
SshConfig = Annotated[
    Path | None,
    typer.Option(
        help="In place of ~/.ssh/config; KINEMA_SSH_CONFIG does the same.", rich_help_panel=PANEL
    ),
]
AtOnce = Annotated[
    int, typer.Option(min=1, help="Hosts talked to at the same time.", rich_help_panel=PANEL)
]


def reach(
    hostfile: Path | None,
    include: str | None,
    exclude: str | None,
    ssh_config: Path | None,
    at_once: int = 64,
) -> tuple[Ssh, list[Host]]:
    """The hosts that were chosen, and the way to them.

    Raises:
        KinemaError: no hostfile, a wrong line, an unknown name, no `ssh`.
    """
    from kinema.cluster.hostfile import find_hosts
    from kinema.cluster.ssh import Ssh

    hosts = find_hosts(hostfile, include=_names(include), exclude=_names(exclude))
    return Ssh.from_environment(ssh_config, at_once), hosts


def seconds(text: str | None, where: str) -> float | None:
    """`60s`, `10m`, `12h`, `5d`, or plain seconds.

    Args:
        where: the option.

    Raises:
        KinemaError: something else, or no time at all.
    """
    from kinema.config.errors import KinemaError

    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,7}(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None or float(match.group(1)) <= 0:
        raise KinemaError(f"{text!r} is no time", where=where, hint=f"{where} 60s, 10m, 12h")
    return float(match.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match.group(2)]


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []
