"""`kinema cluster top` and `health`: what the nodes do, and whether they are well."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kinema.cli.cluster_hosts import AtOnce, Exclude, Hostfile, Include, SshConfig, reach, seconds
from kinema.cli.grouped_help import GroupedCommand

if TYPE_CHECKING:
    from kinema.cluster.health import Health
    from kinema.cluster.top import Watch

WHAT, AGAIN, BANDWIDTH = "What is looked at", "Again and again", "Bandwidth"


def register_cluster(app: typer.Typer) -> None:
    app.command("top", cls=GroupedCommand)(top)
    app.command("health", cls=GroupedCommand)(health)


def top(
    once: Annotated[bool, typer.Option("--once", help="One reading, then end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: JSON.")] = False,
    gpus: Annotated[bool, typer.Option("--gpus", help="A line for each GPU.")] = False,
    sort: Annotated[
        Literal["worst", "name", "utilisation", "power", "temperature", "memory"],
        typer.Option(help="Which nodes come first."),
    ] = "worst",
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between readings.")] = 2.0,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    ssh_config: SshConfig = None,
    at_once: AtOnce = 64,
) -> None:
    """GPUs, processes, memory, power and clocks of all nodes, live. Ctrl-C ends it.

    Nodes without GPUs show their CPU, memory and training processes.
    """
    from rich.console import Console

    from kinema.cluster.top import Watch, as_dict
    from kinema.cluster.top_table import render
    from kinema.config.errors import KinemaError

    if as_json and not once:
        raise KinemaError("--json is one reading", hint="--once --json")
    if not once and not sys.stdout.isatty():
        raise KinemaError("the live view needs a terminal", hint="--once, or --once --json")
    ssh, hosts = reach(hostfile, include, exclude, ssh_config, at_once)
    with Watch(ssh, hosts) as watch:
        if not once:
            _live(watch, gpus, sort, every)
            return
        nodes = watch.read()
    if as_json:
        print(json.dumps(as_dict(nodes), indent=2))
    else:
        console = Console()
        console.print(render(nodes, width=console.width, by_gpu=gpus, sort=sort))
    if all(node.problem for node in nodes):
        raise typer.Exit(1)


def _live(
    watch: Watch,
    gpus: bool,
    sort: Literal["worst", "name", "utilisation", "power", "temperature", "memory"],
    every: float,
) -> None:
    import time

    from rich.console import Console
    from rich.live import Live

    from kinema.cluster.top_table import render

    console = Console()
    watch.follow(every)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                width, height = console.size
                room = max(height - 6, 1)
                nodes = watch.latest()
                table = render(nodes, width=width, by_gpu=gpus, sort=sort, most_rows=room)
                live.update(table, refresh=True)
                time.sleep(min(every, 1.0))
        except KeyboardInterrupt:
            return


def health(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Without the bandwidth test.", rich_help_panel=WHAT),
    ] = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="File or folder that must be the same on all nodes; repeatable.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder for outputs or data; repeatable; default: outputs.", rich_help_panel=WHAT
        ),
    ] = None,
    cwd: Annotated[
        Path | None,
        typer.Option(help="Folder on the nodes; default: this one.", rich_help_panel=WHAT),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="On the nodes; default: the path of this one.", rich_help_panel=WHAT),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="What counts as wrong: skew_error_ms=100; repeatable.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what is right too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All checks as JSON.")] = False,
    sizes: Annotated[
        str | None,
        typer.Option(help="Of the tensors that are summed: 1M,1G.", rich_help_panel=BANDWIDTH),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="As for launch.", rich_help_panel=BANDWIDTH),
    ] = None,
    ib_hca: Annotated[
        str | None, typer.Option(help="As for launch.", rich_help_panel=BANDWIDTH)
    ] = None,
    interface: Annotated[
        str | None, typer.Option(help="As for launch.", rich_help_panel=BANDWIDTH)
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(min=1, help="Seconds for one measurement.", rich_help_panel=BANDWIDTH),
    ] = 180,
    every: Annotated[
        str | None,
        typer.Option(help="Go on, a round every 60s or 5m.", rich_help_panel=AGAIN),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option("--for", help="How long: 10m, 12h; default: on.", rich_help_panel=AGAIN),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of all readings; default: cluster-health.jsonl.", rich_help_panel=AGAIN
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Run folder whose events.jsonl gets readings and changes too.",
            rich_help_panel=AGAIN,
        ),
    ] = None,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    ssh_config: SshConfig = None,
    at_once: AtOnce = 64,
) -> None:
    """Are the nodes fit to train? GPUs, links, clocks, disks, versions, bandwidth.

    Exit code 1 if a node has an error (with --strict: or a warning).
    """
    from kinema.cluster import environment
    from kinema.cluster.bandwidth import Test
    from kinema.cluster.health import Examiner, Wanted, steps
    from kinema.cluster.verdict import Limits, passed
    from kinema.config.errors import KinemaError
    from kinema.telemetry.progress import Progress

    for name, value in {"--for": for_, "--history": history, "--run": run}.items():
        if value is not None and every is None:
            raise KinemaError(f"{name} goes with --every", hint="--every 60s")
    if every is not None and as_json:
        raise KinemaError("--json is one round; --every keeps JSON in its --history")
    if run is not None and not run.is_dir():
        raise KinemaError("no such run folder", where=str(run))
    tests = {"--sizes": sizes, "--env": env, "--ib-hca": ib_hca, "--interface": interface}
    for name, given in tests.items():
        if quick and given is not None:
            raise KinemaError(f"{name} is for the bandwidth test, which --quick leaves out")
    pause_s, most_s = seconds(every, "--every"), seconds(for_, "--for")
    limits = Limits().with_given(limit or [])
    ssh, hosts = reach(hostfile, include, exclude, ssh_config, at_once)
    folder, interpreter = str(cwd or Path.cwd()), python or sys.executable
    variables = environment.network(ib_hca, interface) | environment.asked_for(env or [])
    wanted = Wanted(
        folder,
        interpreter,
        tuple(disk or ["outputs"]),
        tuple(weights or ()),
        None if quick else Test(interpreter, folder, variables, sizes, time_limit),
        limits,
    )
    with Progress("checking", total=steps(wanted) * len(hosts), unit="step") as bar:
        examiner = Examiner(ssh, hosts, wanted, bar.advance)
        at_first = examiner.quick()
        slow = examiner.slow(at_first)
    found = at_first.joined(slow)
    _print(found, as_json, verbose)
    if pause_s is not None:
        from kinema.cluster.rounds import Rounds

        path = history or Path("cluster-health.jsonl")
        rounds = Rounds(Examiner(ssh, hosts, wanted), at_first, slow, path, run)
        print(f"\na round every {every}, history in {path}; Ctrl-C ends it", file=sys.stderr)
        found = rounds.go_on(pause_s, most_s)
    raise typer.Exit(0 if passed(found.statuses, strict=strict) else 1)


def _print(found: Health, as_json: bool, verbose: bool) -> None:
    from kinema.cluster.health_report import report

    print(json.dumps(found.as_dict(), indent=2) if as_json else report(found, verbose=verbose))
