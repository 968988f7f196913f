"""A launch as a Slurm script: `sbatch` in place of ssh."""

from __future__ import annotations

import re
import shlex

from kinema.cluster.environment import DEFAULTS, RANK_PREFIX
from kinema.cluster.on_node.processes import HOST_MARK, MARK
from kinema.cluster.plan import Job
from kinema.cluster.ssh import quoted
from kinema.config.errors import KinemaError

WARNING_S = 300
"""Seconds before its time limit that a job is told, so that it writes a checkpoint."""


def script(
    job: Job, *, nodes: int, processes: int, time_limit: str | None, partition: str | None
) -> str:
    """A complete script for `sbatch`.

    Slurm starts one torchrun per node. Before the time limit all ranks save, and the job is put
    into the queue again; so it is when a node fails.

    Args:
        processes: on each node.
        time_limit: as Slurm writes it, `2-00:00:00`; None: the partition's.

    Raises:
        KinemaError: a time or partition that Slurm would not take.
    """
    for option, value in {"--time": time_limit, "--partition": partition}.items():
        if value is not None and not re.fullmatch(r"[\w.,:-]+", value):
            raise KinemaError(f"{value!r} is nothing for Slurm", where=option)
    asked = {
        "job-name": "kinema",
        "nodes": str(nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(processes),
        "mem": "0",  # all of a node's: many sites give a part only, also to exclusive jobs
        "time": time_limit,
        "partition": partition,
        "output": "slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{WARNING_S}",
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None]
    lines += ["#SBATCH --exclusive", "#SBATCH --requeue", "set -uo pipefail", ""]
    lines += [f"cd {shlex.quote(job.folder)} || exit 1"]
    variables = DEFAULTS | {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": RANK_PREFIX} | job.environment
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    if "OMP_NUM_THREADS" not in job.environment:
        lines += [
            f"threads=$(( ${{SLURM_CPUS_ON_NODE:-{processes}}} / {processes} ))",
            "export OMP_NUM_THREADS=$(( threads > 0 ? threads : 1 ))",
        ]
    lines += [f'export {MARK}="slurm-$SLURM_JOB_ID"', ""]
    lines += [
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "port=$(( 20000 + SLURM_JOB_ID % 20000 ))",
        "",
        "# Told before the time limit: torchrun passes SIGTERM on, and ranks finish and save.",
        "again=",
        "trap 'again=yes; kill -TERM \"$step\"' USR1",
        "",
    ]
    words = [job.python, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    words += [f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
    words += [f"--max-restarts={job.max_restarts}", "--tee=3"]
    # Each node's own shell fills in what differs between nodes.
    inside = (
        f"export {HOST_MARK}=$(hostname -s); "
        'host=$([ "$SLURM_NODEID" = 0 ] && echo true || echo false); '
        f'exec {quoted(words)} --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$0:$1" '
        '--rdzv-conf="is_host=$host" --log-dir="$2/$SLURM_NODEID" '
        f'--no-python {quoted(job.program)} "${{@:3}}"'
    )
    if not {"--load", "--continue"} & {word.partition("=")[0] for word in job.train}:
        lines += [
            "# Queued again, it goes on with the newest run of this recipe.",
            "more=",
            'if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then more=--continue; fi',
        ]
        more = " $more"
    else:
        more = ""
    lines += [
        'logs="$PWD/cluster-logs/slurm-$SLURM_JOB_ID"',
        'mkdir -p "$logs"',
        # One task a node; without --cpu-bind Slurm may tie it to one core.
        f"srun --cpu-bind=none --kill-on-bad-exit=1 bash -c {shlex.quote(inside)} "
        f'"$first" "$port" "$logs"{more} &',
        "step=$!",
        "# A trap interrupts `wait`: go on until the step has really ended.",
        'while :; do wait "$step"; code=$?; kill -0 "$step" 2>/dev/null || break; done',
        'if [ -n "$again" ]; then scontrol requeue "$SLURM_JOB_ID"; exit 0; fi',
        'exit "$code"',
        "",
    ]
    return "\n".join(lines)
