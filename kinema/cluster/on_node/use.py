"""What a node is doing: GPUs, the processes on them, training processes, load. Asked by lines."""

from __future__ import annotations

import os
import pwd
import socket
import time
from typing import Any

from kinema.cluster.on_node import machine, nvidia
from kinema.cluster.on_node.processes import HOST_MARK, MARK

FIRST_SAMPLE_S = 0.2
_last: dict[Any, tuple[float, float]] = {}
"""Key -> (CPU seconds used, when), of the reading before."""


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """One reading.

    Args:
        question: `gpu` and `apps` (fields for nvidia-smi), `host`, `others` (names of hosts: where
            two are one machine, each shows the processes that were started for it).
    """
    gpus = nvidia.query("gpu", question["gpu"])
    apps: dict[str, Any] = {"text": "", "problem": gpus["problem"], "fields": []}
    listing = ""
    if gpus["problem"] is None:
        apps = nvidia.query("compute-apps", question["apps"])
        if "MIG-" in apps["text"]:  # which GPU a slice is of
            listing = machine.run("nvidia-smi", "-L")["text"]
    return {
        "time": time.time(),
        "hostname": socket.gethostname(),
        "gpu": gpus,
        "apps": apps,
        "listing": listing,
        "load": _load(),
        "cores": os.cpu_count(),
        "cpu_percent": _cpu_percent(),
        "memory": machine.memory(),
        "processes": _processes(_pids(apps), question["host"], question["others"]),
    }


def _pids(apps: dict[str, Any]) -> set[int]:
    """Of processes on GPUs; what cannot be read here is complained of on the other side."""
    if "pid" not in apps["fields"]:
        return set()
    at = apps["fields"].index("pid")
    cells = [line.split(",")[at : at + 1] for line in apps["text"].splitlines()]
    return {int(cell[0]) for cell in cells if cell and cell[0].strip().isdecimal()}


def _load() -> float | None:
    words = (machine.read("proc", "loadavg") or "").split()
    return float(words[0]) if words else None


def _cpu_percent() -> float | None:
    """Of all cores, since the last reading."""
    if "cpu" not in _last:
        _last["cpu"] = machine.cpu_ticks()
        time.sleep(FIRST_SAMPLE_S)
    now, before = machine.cpu_ticks(), _last["cpu"]
    _last["cpu"] = now
    passed = now[1] - before[1]
    return 100 * (now[0] - before[0]) / passed if passed > 0 else None


def _processes(on_gpus: set[int], host: str, others: list[str]) -> list[dict[str, Any]]:
    """Processes on GPUs, and those of trainings whether on a GPU or not."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        process = _describe(int(name))
        if process is None:
            continue
        elsewhere = process["host"] in others and process["host"] != host
        if process["pid"] in on_gpus or (process["training"] and not elsewhere):
            found[process["pid"]] = process
    for process in found.values():
        parent = found.get(process["parent"])
        process["helper"] = bool(
            parent and parent["training"] and parent["rank"] == process["rank"]
        )
    for key in [k for k in _last if isinstance(k, int) and k not in found]:
        del _last[key]
    return sorted(found.values(), key=lambda p: int(p["pid"]))


def _describe(pid: int) -> dict[str, Any] | None:
    folder = f"/proc/{pid}"
    try:
        owner = os.stat(folder).st_uid
        with open(f"{folder}/cmdline", "rb") as file:
            words = [w.decode(errors="replace") for w in file.read().rstrip(b"\0").split(b"\0")]
        with open(f"{folder}/stat", "rb") as file:
            stat = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    environment = _environment(folder)
    rank = environment.get("RANK", "")
    names = [os.path.basename(word) for word in words[:4]]
    trains = "kinema" in names and any(word.startswith("train") for word in words[:6])
    ticks = os.sysconf("SC_CLK_TCK")
    try:
        user = pwd.getpwuid(owner).pw_name
    except KeyError:
        user = str(owner)
    return {
        "pid": pid,
        "parent": int(stat[1]),
        "user": user,
        "command": " ".join(words)[:400],
        "training": trains and stat[0] not in (b"Z", b"X"),
        "rank": int(rank) if rank.isdecimal() else None,
        "launch": environment.get(MARK),
        "host": environment.get(HOST_MARK),
        "run": _run(folder) if trains else None,
        "recipe": _after_train(words) if trains else None,
        "memory": int(stat[21]) * os.sysconf("SC_PAGE_SIZE"),
        "cpu_percent": _since(pid, (int(stat[11]) + int(stat[12])) / ticks) if trains else None,
    }


def _environment(folder: str) -> dict[str, str]:
    """Of a process; nothing where it is another user's."""
    try:
        with open(f"{folder}/environ", "rb") as file:
            pairs = [pair.partition(b"=") for pair in file.read().split(b"\0")]
    except OSError:
        return {}
    return {k.decode(errors="replace"): v.decode(errors="replace") for k, _, v in pairs}


def _after_train(words: list[str]) -> str | None:
    """`kinema train RECIPE`: the recipe."""
    for at, word in enumerate(words[:6]):
        if word.startswith("train") and at + 1 < len(words):
            return words[at + 1]
    return None


def _run(folder: str) -> str | None:
    """The run folder that a process keeps the log of."""
    try:
        for name in os.listdir(f"{folder}/fd"):
            target = os.readlink(f"{folder}/fd/{name}")
            if os.path.basename(target) in ("log.jsonl", "events.jsonl"):
                return os.path.dirname(target)
    except OSError:
        pass
    return None


def _since(pid: int, used_s: float) -> float | None:
    """Percent of one core since the last reading."""
    now = time.monotonic()
    before = _last.get(pid)
    _last[pid] = used_s, now
    if before is None or now <= before[1]:
        return None
    return 100 * (used_s - before[0]) / (now - before[1])
