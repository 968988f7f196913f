"""`kinema cluster kill` and `stacks`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinema.cli.cluster_hosts import AtOnce, Exclude, Hostfile, Include, SshConfig, reach
from kinema.cli.grouped_help import GroupedCommand

if TYPE_CHECKING:
    from kinema.cluster.hostfile import Host
    from kinema.cluster.ssh import Problem

Launch = Annotated[
    str | None, typer.Option("--launch", help="Only of this launch (its name, as `launch` says).")
]


def register_cluster(app: typer.Typer) -> None:
    app.command("kill", cls=GroupedCommand)(kill)
    app.command("stacks", cls=GroupedCommand)(stacks)


def kill(
    launch: Launch = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds from SIGTERM to SIGKILL; ranks save meanwhile.")
    ] = 60.0,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    ssh_config: SshConfig = None,
    at_once: AtOnce = 64,
) -> None:
    """End your training processes on all hosts, after showing them and asking.

    Yours are those of your user that a launch started; nothing else is touched. torchrun is told
    first, and lets its ranks finish their step and save. Exit code 1 if something remains.
    """
    from kinema.cluster.running import running, stop

    ssh, hosts = reach(hostfile, include, exclude, ssh_config, at_once)
    found, silent = running(ssh, hosts, launch)
    _print_silent(silent)
    if not found:
        print(f"no training process of yours on {len(hosts) - len(silent)} hosts")
        raise typer.Exit(1 if silent else 0)
    for host in hosts:
        own = [p for p in found if p.host == host]
        for name in dict.fromkeys(p.launch for p in own):
            print(f"{host.name}, launch {name}:")
            for process in own:
                if process.launch == name:
                    print(process)
    if not yes and not typer.confirm(f"End these {len(found)} processes?"):
        print("nothing was ended")
        raise typer.Exit(1)
    bad = bool(silent)
    for result in stop(ssh, found, hosts, grace):
        if result.problem:
            print(f"{result.host}: {result.problem}", file=sys.stderr)
            bad = True
            continue
        print(f"{result.host}: {result.ended} ended, {result.killed} of them by SIGKILL")
        for process in result.remaining:
            print(f"{result.host}: remains: {process}", file=sys.stderr)
            bad = True
    raise typer.Exit(1 if bad else 0)


def stacks(
    launch: Launch = None,
    raw: Annotated[
        Path | None, typer.Option(help="Folder for every process's whole dump, all threads.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one process.")] = 15.0,
    python: Annotated[
        str | None,
        typer.Option(help="On the nodes, py-spy beside it; default: the path of this one."),
    ] = None,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    ssh_config: SshConfig = None,
    at_once: AtOnce = 64,
) -> None:
    """Where every training process is right now: Python stacks, the same ones together.

    For a run that stands still: the small group is usually the one that the large one waits for.
    """
    from kinema.cluster.stacks import collect, group, render

    ssh, hosts = reach(hostfile, include, exclude, ssh_config, at_once)
    folder = str(Path(python or sys.executable).parent)
    dumps, silent = collect(ssh, hosts, bin_folder=folder, limit_s=timeout, launch=launch)
    _print_silent(silent)
    if not dumps:
        print(f"no training process of yours on {len(hosts) - len(silent)} hosts")
    else:
        print(render(group(dumps)))
    if raw is not None:
        raw.mkdir(parents=True, exist_ok=True)
        for dump in dumps:
            name = f"{dump.process.host.name}-{dump.process.kind}-{dump.process.pid}.txt"
            (raw / name).write_text(dump.text or f"{dump.error}\n")
    raise typer.Exit(1 if silent or any(dump.error for dump in dumps) else 0)


def _print_silent(silent: Sequence[tuple[Host, Problem]]) -> None:
    for host, problem in silent:
        print(f"{host.name}: {problem}", file=sys.stderr)
