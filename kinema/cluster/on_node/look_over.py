"""What `health` wants to know of a node, as its files and tools say it."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import tempfile
import time
from typing import Any

from kinema.cluster.on_node import machine, nvidia

IB_COUNTERS = (
    *("link_downed", "link_error_recovery", "symbol_error", "port_rcv_errors"),
    *("local_link_integrity_errors", "excessive_buffer_overrun_errors"),
)
MODULES = ("nvidia_peermem", "nv_peer_mem")
LATENCY_ROUNDS = 8


def main(
    gpu: list[list[str]], apps: list[list[str]], rows: list[list[str]], folders: list[str]
) -> dict[str, Any]:
    """Look; nothing is changed but small files that are written and deleted in `folders`.

    Args:
        gpu, apps, rows: fields for nvidia-smi.
        folders: where outputs and data are.
    """
    gpus = nvidia.query("gpu", gpu)
    answered = gpus["problem"] is None
    remapped: dict[str, Any] | None = nvidia.query("remapped-rows", rows) if answered else None
    return {
        "kernel": platform.release(),
        "gpu": gpus,
        "apps": nvidia.query("compute-apps", apps) if answered else None,
        "rows": remapped,
        "nvlink": machine.run("nvidia-smi", "nvlink", "--status") if answered else None,
        "nvlink_errors": machine.run("nvidia-smi", "nvlink", "-e") if answered else None,
        "pci": [n for n in machine.names("dev") if re.fullmatch(r"nvidia\d+", n)],
        "kernel_log": _kernel_log(),
        "uptime_s": machine.uptime_s(),
        "chronyc": machine.run("chronyc", "-n", "tracking", timeout_s=10),
        "timedatectl": machine.run("timedatectl", "show", timeout_s=10),
        "infiniband": _infiniband(),
        "ethernet": _ethernet(),
        "modules": [name for name in MODULES if _loaded(name)],
        "disks": {folder: _disk(folder) for folder in folders},
        "shared_memory": _shared_memory(),
        "limits": {
            "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        },
        "cores": len(os.sched_getaffinity(0)),
    }


def _kernel_log() -> dict[str, Any]:
    """Lines of the NVIDIA driver's errors since the machine started, with seconds since then."""
    said = machine.run("dmesg")
    if said["problem"]:
        journal = machine.run("journalctl", "-k", "-b", "-o", "short-monotonic", "--no-pager", "-q")
        if journal["problem"] or not journal["text"].strip():
            why = journal["problem"] or "shows nothing to this user"
            problem = f"dmesg {said['problem']}; journalctl {why}"
            return {"text": "", "problem": problem}
        said = journal
    lines = [line for line in said["text"].splitlines() if "NVRM: Xid" in line]
    return {"text": "\n".join(lines[-200:]), "problem": None}


def _infiniband() -> list[dict[str, Any]]:
    ports = []
    for device in machine.names("sys", "class", "infiniband"):
        where = ("sys", "class", "infiniband", device, "ports")
        for port in machine.names(*where):
            counters = {name: machine.read(*where, port, "counters", name) for name in IB_COUNTERS}
            ports.append(
                {
                    "port": f"{device}:{port}",
                    "counters": {name: text for name, text in counters.items() if text},
                    **{
                        name: machine.read(*where, port, name)
                        for name in ("state", "phys_state", "rate", "link_layer")
                    },
                }
            )
    return ports


def _ethernet() -> list[dict[str, Any]]:
    where = ("sys", "class", "net")
    found = [name for name in machine.names(*where) if name != "lo"]
    # Bridges, tunnels and containers' ends have no device behind them.
    real = [name for name in found if os.path.exists(machine.path(*where, name, "device"))]
    counters = ("carrier_changes", "statistics/rx_errors", "statistics/tx_errors")
    return [
        {
            "name": name,
            "state": machine.read(*where, name, "operstate"),
            "speed": machine.read(*where, name, "speed"),
            "counters": {
                os.path.basename(c): text for c in counters if (text := _counter(*where, name, c))
            },
        }
        for name in real or [n for n in found if machine.read(*where, n, "operstate") == "up"]
    ]


def _counter(*parts: str) -> str | None:
    return machine.read(*parts[:-1], *parts[-1].split("/"))


def _loaded(module: str) -> bool:
    text = machine.read("proc", "modules") or ""
    return any(line.split(" ")[0] == module for line in text.splitlines())


def _shared_memory() -> dict[str, int] | None:
    try:
        usage = shutil.disk_usage(machine.path("dev", "shm"))
    except OSError:
        return None
    return {"total": usage.total, "free": usage.free}


def _disk(folder: str) -> dict[str, Any]:
    """Room, and how long a small file takes from writing to its safe place and back."""
    there = os.path.abspath(os.path.expanduser(folder))
    exists = os.path.isdir(there)
    while not os.path.exists(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    found: dict[str, Any] = {"exists": exists, "at": there, "latency_ms": None, "error": None}
    try:
        found["free"] = shutil.disk_usage(there).free
        times = [_write_and_read(there) for _ in range(LATENCY_ROUNDS)] if exists else []
    except OSError as error:
        found["error"] = error.strerror or str(error)
        return found
    if times:
        found["latency_ms"] = {
            "median": 1e3 * sorted(times)[len(times) // 2],
            "most": 1e3 * max(times),
        }
    return found


def _write_and_read(folder: str) -> float:
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".kinema-health-") as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        file.read()
    return time.perf_counter() - start
