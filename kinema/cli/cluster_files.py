"""`kinema cluster setup` and `sync`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from kinema.cli.cluster_hosts import AtOnce, Exclude, Hostfile, Include, SshConfig, reach, seconds
from kinema.cli.grouped_help import GroupedCommand

sync_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Copy files to the nodes, or checkpoints from one.",
)


def register_cluster(app: typer.Typer) -> None:
    app.command("setup", cls=GroupedCommand)(setup)
    app.add_typer(sync_app, name="sync")


def setup(
    into: Annotated[
        str | None,
        typer.Option(help="Folder on the nodes for the code; default: as here. `~` is their home."),
    ] = None,
    venv: Annotated[
        str | None,
        typer.Option(help="Environment on the nodes; default: as here, or .venv in --into."),
    ] = None,
    python: Annotated[
        str, typer.Option(help="On the nodes, at least 3.11: makes the environment.")
    ] = f"python{sys.version_info[0]}.{sys.version_info[1]}",
    source: Annotated[
        Path | None, typer.Option(help="Source tree to install; default: the one this runs from.")
    ] = None,
    kinema: Annotated[
        str | None,
        typer.Option(help="In place of a source tree: a wheel here, or a version: kinema==0.1.0."),
    ] = None,
    torch: Annotated[
        str | None, typer.Option(help="Requirement; default: the version that is here.")
    ] = None,
    index_url: Annotated[
        str | None,
        typer.Option(help="Where pip finds torch: https://download.pytorch.org/whl/cu130."),
    ] = None,
    extras: Annotated[str, typer.Option(help="Of Kinema: wandb,pretrained.")] = "",
    wheelhouse: Annotated[
        Path | None, typer.Option(help="Folder here with all wheels, for nodes without a network.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")
    ] = False,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    ssh_config: SshConfig = None,
    at_once: AtOnce = 16,
) -> None:
    """Bring the same code and the same environment to all nodes, and compare them.

    Again, it does only what is missing. Changed code is copied and needs no installation.
    """
    from kinema.cluster.setup import Wanted, installed_torch, set_up, source_tree
    from kinema.config.errors import KinemaError

    ssh, hosts = reach(hostfile, include, exclude, ssh_config, at_once)
    if source and kinema:
        raise KinemaError("--source and --kinema exclude each other")
    wheel = Path(kinema) if kinema and kinema.endswith(".whl") else None
    for given in (source, wheelhouse, wheel):
        if given is not None and not given.exists():
            raise KinemaError("no such file or folder", where=str(given))
    tree = None if kinema else (source or source_tree())
    if tree is None and kinema is None:
        raise KinemaError(
            "this Kinema does not run from a source tree",
            hint="--source TREE, or --kinema with a wheel or a version",
        )
    if into is None:
        into = str((source_tree() or tree or Path.cwd()).absolute())
        in_venv = sys.prefix != sys.base_prefix
        venv = venv or (sys.prefix if in_venv else None)
    wanted = Wanted(
        into=into.rstrip("/"),
        venv=venv or f"{into.rstrip('/')}/.venv",
        python=python,
        torch=torch or installed_torch(),
        source=tree,
        kinema=kinema,
        extras=extras,
        index_url=index_url,
        wheelhouse=wheelhouse,
    )
    set_up(ssh, hosts, wanted, dry_run=dry_run, say=print)


@sync_app.command("weights", cls=GroupedCommand)
def weights(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File or folder here.")],
    into: Annotated[
        str | None, typer.Option(help="Path on the nodes; default: the same as here.")
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove files there that are not in PATH here.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent.")] = False,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    ssh_config: SshConfig = None,
    at_once: AtOnce = 16,
) -> None:
    """Make a file or folder the same on all nodes: weights, a manifest, a cache.

    Sizes and hashes are compared, only what differs is sent, and it gets its name when it is
    whole. After a broken connection the same command goes on where it was. The PATH there becomes
    PATH here; files that it has besides are refused, or removed with --delete.
    """
    from kinema.cluster.copy_out import copy_out
    from kinema.cluster.ssh import require

    ssh, hosts = reach(hostfile, include, exclude, ssh_config, at_once)
    target = into or str(path.absolute())
    delete_with = "" if delete else None
    copied = copy_out(ssh, hosts, path, target, delete_with=delete_with, dry_run=dry_run)
    for one in copied:
        if one.problem is None and one.same_as:
            print(f"{one.host.name}: shares the disk of {one.same_as}")
        elif one.problem is None:
            verb = "would get" if dry_run else "got"
            same = "has the same already"
            what = f"{verb} {one.files} files, {one.bytes:,} bytes" if one.files else same
            print(f"{one.host.name}: {what}")
    require([(one.host, one.problem) for one in copied], "did not get it")


@sync_app.command("run", cls=GroupedCommand)
def run(
    place: Annotated[str, typer.Argument(metavar="HOST:PATH", help="Run folder on a host.")],
    into: Annotated[
        Path | None, typer.Option(help="Run folder here; default: its name, in this folder.")
    ] = None,
    every: Annotated[
        str | None, typer.Option(help="Look again and again: 60s, 5m. Ctrl-C ends it.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the newest; default: all.")
    ] = None,
    hostfile: Hostfile = None,
    ssh_config: SshConfig = None,
) -> None:
    """Follow a run's checkpoints without the optimizer's state, the newest first.

    What arrives generates and starts new runs; it does not resume. A checkpoint has its name here
    only when it is whole. A broken connection is taken up where it broke.
    """
    from kinema.cluster.follow import look_once
    from kinema.cluster.hostfile import DEFAULT, parse_host, read_hostfile
    from kinema.cluster.ssh import Ssh
    from kinema.config.errors import KinemaError

    name, colon, path = place.partition(":")
    try:
        host = parse_host([name])
    except ValueError as error:
        raise KinemaError(str(error), hint="HOST:PATH") from None
    if not colon or not path.strip("/"):
        raise KinemaError(f"{place!r} names no run", hint="HOST:PATH")
    if hostfile or DEFAULT.is_file():  # it may say which user and port
        listed = {one.name: one for one in read_hostfile(hostfile or DEFAULT)}
        host = listed.get(name, host)
    path = path.rstrip("/")
    pause = seconds(every, "--every")
    ssh = Ssh.from_environment(ssh_config)
    while True:
        result = look_once(ssh, host, path, into or Path(Path(path).name), keep=keep, say=print)
        for old in result.pruned:
            print(f"{old} removed")
        if pause is None:
            if result.problem:
                raise KinemaError(str(result.problem), where=place)
            if not result.new:
                print("nothing new")
            return
        if result.problem:
            print(f"{place}: {result.problem} (trying again in {every})", file=sys.stderr)
        time.sleep(pause)
