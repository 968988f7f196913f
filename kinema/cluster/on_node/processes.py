"""The training processes of this user on this machine, found by what marks them as ours.

A process counts if it is this user's, was started by a launch (its environment says which), and
runs Python, torchrun, kinema or py-spy. A shell that has the variable, or an editor, does not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

MARK = "KINEMA_LAUNCH"
"""Environment variable with the launch's name; children inherit it."""
HOST_MARK = "KINEMA_LAUNCH_HOST"
"""Environment variable with the host's name in the hostfile."""
OURS = re.compile(r"(python[\d.]*|torchrun|kinema|py-spy)")
HELPERS_END_S = 5.0
"""Decode workers and watchdogs end by themselves so soon after their rank."""
KILL_S = 5.0
"""After SIGKILL; what is there then waits in the kernel."""

Process = dict[str, Any]
"""pid, parent, start, launch, host, rank, kind (torchrun, rank or helper), state, command."""


def main(host: str, others: list[str], launch: str | None = None) -> list[Process]:
    """See `find`."""
    return find(host, others, launch)


def find(host: str, others: list[str], launch: str | None = None) -> list[Process]:
    """Training processes that belong to `host`.

    Args:
        others: hosts that are asked as well; where two names are one machine, each reports its own.
        launch: only of this launch.
    """
    found = []
    for name in os.listdir("/proc"):
        process = _read(int(name)) if name.isdecimal() else None
        if process is None or (launch and process["launch"] != launch):
            continue
        if process["host"] == host or process["host"] not in others:
            found.append(process)
    by_pid = {p["pid"]: p for p in found}
    for process in found:
        process["kind"] = _kind(process, by_pid.get(process["parent"]))
    order = {"torchrun": 0, "rank": 1, "helper": 2}
    return sorted(found, key=lambda p: (p["launch"], order[p["kind"]], p["rank"] or 0, p["pid"]))


def end(
    look: Callable[[], list[Process]],
    grace_s: float,
    hurry: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """End processes: torchrun first (it tells its ranks), then ranks without one, then helpers.

    Args:
        look: the processes that are left.
        grace_s: seconds between SIGTERM and SIGKILL.
        hurry: whether to kill at once.

    Returns:
        `ended`: how many; `killed` and `remaining`: those killed, and those that even so remain.
    """
    deadline = time.monotonic() + grace_s
    told: dict[tuple[int, str], Process] = {}
    seen: dict[tuple[int, str], Process] = {}
    while True:
        left = look() or _again(look)
        seen.update({(p["pid"], p["start"]): p for p in left})
        if not left or hurry() or time.monotonic() >= deadline:
            break
        kinds = {p["kind"] for p in left}
        first = "torchrun" if "torchrun" in kinds else "rank" if "rank" in kinds else "helper"
        if first == "helper":
            deadline = min(deadline, time.monotonic() + HELPERS_END_S)
        for process in left:
            key = (process["pid"], process["start"])
            if process["kind"] == first and key not in told:
                told[key] = process
                send(process, signal.SIGTERM)
        time.sleep(0.1)
    killed: dict[tuple[int, str], Process] = {}
    deadline = time.monotonic() + KILL_S
    while left and time.monotonic() < deadline:
        for process in left:
            killed[(process["pid"], process["start"])] = process
            send(process, signal.SIGKILL)
        time.sleep(0.1)
        left = look()
    return {"ended": len(seen) - len(left), "killed": list(killed.values()), "remaining": left}


def _again(look: Callable[[], list[Process]]) -> list[Process]:
    """Nothing is believed at the second look only: a process that just starts a program has no
    name and no environment for a moment."""
    time.sleep(0.1)
    return look()


def send(process: Process, number: int) -> None:
    """A signal to a process, if it is still the one that was found."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            # Held, so that its number cannot become another process's meanwhile.
            held = os.pidfd_open(process["pid"])
        except OSError as error:
            if error.errno != errno.ENOSYS:  # Linux before 5.3
                return
            held = None
        try:
            now = _read(process["pid"])
            if now is None or now["start"] != process["start"]:
                return
            if held is None:
                os.kill(process["pid"], number)
            else:
                signal.pidfd_send_signal(held, number)
        finally:
            if held is not None:
                os.close(held)


def _read(pid: int) -> Process | None:
    """A marked process of this user; None for all others, and for one that has ended."""
    folder = f"/proc/{pid}"
    try:
        if os.stat(folder).st_uid != os.getuid():
            return None
        with open(f"{folder}/environ", "rb") as file:
            pairs = (p.partition(b"=") for p in file.read().split(b"\0"))
        environment = {k.decode(errors="replace"): v.decode(errors="replace") for k, _, v in pairs}
        if not environment.get(MARK):
            return None
        with open(f"{folder}/cmdline", "rb") as file:
            words = [w.decode(errors="replace") for w in file.read().rstrip(b"\0").split(b"\0")]
        with open(f"{folder}/stat", "rb") as file:
            # The name in brackets may hold anything, so count from its end (man 5 proc).
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    state = fields[0].decode()
    if state in "ZX" or not OURS.fullmatch(os.path.basename(words[0])):
        return None
    rank = environment.get("RANK", "")
    return {
        "pid": pid,
        "parent": int(fields[1]),
        "start": fields[19].decode(),
        "launch": environment[MARK],
        "host": environment.get(HOST_MARK, ""),
        "rank": int(rank) if rank.isdecimal() else None,
        "state": state,
        "command": words,
    }


def _kind(process: Process, parent: Process | None) -> str:
    words = process["command"]
    if process["rank"] is None:
        starts = any(os.path.basename(w) == "torchrun" for w in words[:2])
        return "torchrun" if starts or "torch.distributed.run" in words else "helper"
    names = [os.path.basename(w) for w in words[:3]]
    is_child = parent is not None and parent["rank"] == process["rank"]
    return "rank" if not is_child and "kinema" in names else "helper"
