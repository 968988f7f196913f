"""`kinema cluster launch`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kinema.cli.cluster_hosts import AtOnce, Exclude, Hostfile, Include, SshConfig, reach
from kinema.cli.grouped_help import GroupedCommand
from kinema.cli.overrides import FREE

if TYPE_CHECKING:
    from kinema.cluster.plan import Job

RUN, NET, SLURM = "What runs", "Network", "Slurm (--print slurm)"


def register_cluster(app: typer.Typer) -> None:
    app.command("launch", cls=GroupedCommand, context_settings=FREE)(launch)


def launch(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE [OPTIONS OF KINEMA TRAIN]",
            help="As after `kinema train`: speedrun/stage1 --data-path M --max_steps 100.",
        ),
    ],
    nproc_per_node: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on each node; default: its slots, else its GPUs.",
            rich_help_panel=RUN,
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0, help="How often all ranks start anew when one fails.", rich_help_panel=RUN
        ),
    ] = 3,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For all ranks; repeatable.", rich_help_panel=RUN),
    ] = None,
    cwd: Annotated[
        Path | None,
        typer.Option(help="Folder on the nodes; default: this one.", rich_help_panel=RUN),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="On the nodes; default: the path of this one.", rich_help_panel=RUN),
    ] = None,
    logs: Annotated[
        Path, typer.Option(help="Folder here for HOST/rankN.log.", rich_help_panel=RUN)
    ] = Path("cluster-logs"),
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all nodes and print what would run."),
    ] = False,
    print_as: Annotated[
        Literal["torchrun", "slurm"] | None,
        typer.Option("--print", help="Contact no node; print lines for each, or an sbatch script."),
    ] = None,
    ib_hca: Annotated[
        str | None,
        typer.Option(help="InfiniBand adapters for NCCL: mlx5_0,mlx5_1.", rich_help_panel=NET),
    ] = None,
    interface: Annotated[
        str | None,
        typer.Option(
            help="Ethernet interface for NCCL's and gloo's first contact.", rich_help_panel=NET
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of the first node, as the others see it.", rich_help_panel=NET),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65535,
            help="On the first node, to meet at; 0: a free one.",
            rich_help_panel=NET,
        ),
    ] = 0,
    nodes: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many; default: those of the hostfile.", rich_help_panel=SLURM
        ),
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="Of the job: 2-00:00:00.", rich_help_panel=SLURM)
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="Slurm's partition.", rich_help_panel=SLURM)
    ] = None,
    hostfile: Hostfile = None,
    include: Include = None,
    exclude: Exclude = None,
    ssh_config: SshConfig = None,
    at_once: AtOnce = 64,
) -> None:
    """Train on all hosts: `kinema train` under torchrun, checked first, stopped together.

    Rank 0's output comes here, everybody's goes to files. Ctrl-C lets all ranks finish their step
    and save, a second one kills them. Keep it running (tmux): if it goes, training stops.
    """
    from kinema.cli.cluster_training import understand
    from kinema.cluster import environment, plan, preflight
    from kinema.cluster.collect import Collector
    from kinema.cluster.launch import Launch, to_stderr

    training = understand(words)
    job = plan.Job(
        training.words,
        plan.new_name(),
        str(cwd or Path.cwd()),
        python or sys.executable,
        environment.of_recipe(training.environment)
        | environment.network(ib_hca, interface)
        | environment.asked_for(env or []),
        max_restarts,
    )
    if print_as == "slurm":
        given = {"nodes": nodes, "processes": nproc_per_node}
        _print_slurm(job, given, hostfile, include, exclude, time_limit, partition)
        return
    _only_for_slurm({"--nodes": nodes, "--time": time_limit, "--partition": partition})
    ssh, hosts = reach(hostfile, include, exclude, ssh_config, at_once)
    if print_as == "torchrun":
        parts = preflight.processes_on(
            hosts, [{"gpus": 0, "cores": None}] * len(hosts), nproc_per_node
        )
        meeting = plan.Meeting(address or ssh.address(hosts[0]), port or 29500)
        print(plan.as_text(job, parts, meeting))
        return
    found = preflight.look(
        ssh,
        hosts,
        python=job.python,
        folder=job.folder,
        paths=training.paths,
        disk=training.outputs,
    )
    parts = preflight.processes_on(hosts, found, nproc_per_node)
    meeting, parts = preflight.meet(ssh, parts, python=job.python, address=address, port=port)
    place = {"python": job.python, "folder": job.folder, "disk": training.outputs}
    apart = preflight.without_the_disk(ssh, hosts, **place)
    if apart:
        to_stderr(
            f"note: {', '.join(apart)} do not see {training.outputs} of {hosts[0].name}: sharded "
            "checkpoints, --load and restarts need a disk that all nodes share"
        )
    if dry_run:
        print(plan.as_text(job, parts, meeting))
        return
    versions = found[0]["versions"]
    ranks = sum(part.processes for part in parts)
    to_stderr(
        f"{job.name}: {ranks} ranks on {', '.join(p.host.name for p in parts[:3])}"
        f"{', ...' if len(parts) > 3 else ''}; kinema {versions['kinema']} "
        f"({found[0]['code']}), torch {versions['torch']}, Python {found[0]['python']}"
    )
    collector = Collector(logs / job.name)
    to_stderr(f"all output is in {collector.folder}")
    finished = Launch(ssh, job, parts, meeting, collector, say=to_stderr).run()
    to_stderr("finished" if finished else "stopped")
    raise typer.Exit(0 if finished else 130)


def _only_for_slurm(options: dict[str, Any]) -> None:
    from kinema.config.errors import KinemaError

    for name, value in options.items():
        if value is not None:
            raise KinemaError(f"{name} goes with --print slurm")


def _print_slurm(
    job: Job,
    given: dict[str, int | None],
    hostfile: Path | None,
    include: str | None,
    exclude: str | None,
    time_limit: str | None,
    partition: str | None,
) -> None:
    from kinema.cluster import slurm
    from kinema.config.errors import KinemaError

    nodes, processes = given["nodes"], given["processes"]
    if nodes is None or (processes is None and os.path.exists(hostfile or "nodes.txt")):
        _, hosts = reach(hostfile, include, exclude, None)
        slots = {host.slots for host in hosts}
        nodes = nodes or len(hosts)
        processes = processes or (slots.pop() if len(slots) == 1 else None)
    if processes is None:
        raise KinemaError("how many GPUs has a node?", hint="--nproc-per-node 8")
    text = slurm.script(
        job, nodes=nodes, processes=processes, time_limit=time_limit, partition=partition
    )
    print(text, end="")
