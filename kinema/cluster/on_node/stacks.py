"""Python stacks of every training process on this machine, by py-spy."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kinema.cluster.on_node.processes import Process, find


def main(
    host: str,
    others: list[str],
    bin_folder: str,
    limit_s: float,
    launch: str | None = None,
) -> dict[str, Any]:
    """Dump all at once.

    Args:
        host, others, launch: as `processes.find`.
        bin_folder: where py-spy is, if it is not on the PATH.
        limit_s: seconds for one process.

    Returns:
        `processes`: each with `stack` (py-spy's text) or `error`; `ptrace_scope`: of the kernel.
    """
    processes = [p for p in find(host, others, launch) if p["kind"] != "torchrun"]
    spy = shutil.which("py-spy", path=f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}")
    with ThreadPoolExecutor(16) as pool:
        jobs = [(process, pool.submit(_dump, spy, process, limit_s)) for process in processes]
    for process, job in jobs:
        process.update(job.result())
    return {"processes": processes, "ptrace_scope": _ptrace_scope()}


def _dump(spy: str | None, process: Process, limit_s: float) -> dict[str, str]:
    if spy is None:
        return {"error": "there is no py-spy: pip install py-spy"}
    if process["state"] == "D":
        return {"error": "waits in the kernel (state D: disk, network file system or driver)"}
    try:
        done = subprocess.run(
            [spy, "dump", "--pid", str(process["pid"])],
            capture_output=True,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"py-spy did not finish within {limit_s:g} s"}
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        return {"error": text.splitlines()[0] if text else f"py-spy ended with {done.returncode}"}
    return {"stack": done.stdout.decode(errors="replace")}


def _ptrace_scope() -> int | None:
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
