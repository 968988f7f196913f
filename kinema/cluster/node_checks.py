"""Checks of a node's clock, disks, memory and limits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kinema.cluster.clocks import Clock
from kinema.cluster.verdict import Check, Limits, Status, above, below

GIB = 2**30
UNLIMITED = -1  # resource.RLIM_INFINITY, as Python on Linux has it
_SYNC = (
    "install and start chrony on every node (`chronyc tracking` then says Normal): a clock that "
    "steps backwards makes NCCL abort"
)


def check(look: Mapping[str, Any], limits: Limits) -> Iterator[Check]:
    """Checks of one node."""
    yield _synchronised(look)
    for folder, disk in look["disks"].items():
        yield from _disk(folder, disk, limits)
    yield from _shared_memory(look, limits)
    yield from _user_limits(look, limits)


def clock(apart: Clock, limits: Limits) -> Check:
    """The check of a node's clock against the middle of all.

    Args:
        apart: from `clocks.against_the_middle`.
    """
    most_ms = abs(apart.offset_s) * 1e3
    # Only what the measurement is sure of counts.
    sure_ms = max(most_ms - apart.bound_s * 1e3, 0)
    status = above(sure_ms, limits.skew_warning_ms, limits.skew_error_ms)
    bound = f"± {apart.bound_s * 1e3:.1f} ms"
    way = "ahead of" if apart.offset_s > 0 else "behind"
    value = f"{most_ms:,.1f} {bound} {way} the middle of all clocks"
    limit = f"{limits.skew_warning_ms:g} ms, error at {limits.skew_error_ms:g} ms"
    cure = "" if status == "ok" else f"sudo chronyc makestep before the run, never in it; {_SYNC}"
    return Check("clock", status, value, limit, cure)


def _synchronised(look: Mapping[str, Any]) -> Check:
    name = "time synchronisation"
    chrony, systemd = look["chronyc"], look["timedatectl"]
    if chrony["problem"] is None:
        fields = dict(re.findall(r"^(\S[^:]*?)\s*: (.*)$", chrony["text"], re.MULTILINE))
        state = fields.get("Leap status")
        if state is None:
            line = chrony["text"].strip().splitlines()[:1]
            value = f"chronyc tracking could not be read: {line[0] if line else ''!r}"
            return Check(name, "warning", value, cure="run chronyc tracking there by hand")
        value = f"chrony: {state}, {fields.get('System time', '?')}"
        if state.startswith("Not synchronised"):
            return Check(name, "error", value, "Normal", "check chrony's servers: chronyc sources")
        return Check(name, "ok", value)
    if systemd["problem"] is None:
        match = re.search(r"^NTPSynchronized=(\w+)$", systemd["text"], re.MULTILINE)
        if match is None:
            line = systemd["text"].strip().splitlines()[:1]
            value = f"timedatectl could not be read: {line[0] if line else ''!r}"
            return Check(name, "warning", value, cure="run timedatectl there by hand")
        if match.group(1) == "yes":
            return Check(name, "ok", "the system clock is synchronised (timedatectl)")
        return Check(name, "error", "the system clock is not synchronised", "yes", _SYNC)
    value = f"not known: chronyc {chrony['problem']}, timedatectl {systemd['problem']}"
    return Check(name, "warning", value, cure=_SYNC)


def _disk(folder: str, disk: Mapping[str, Any], limits: Limits) -> Iterator[Check]:
    name = f"disk {folder}"
    if disk["error"]:
        value = f"{disk['at']}: {disk['error']}"
        cure = "give this user the right to write there, or mount it anew"
        if re.search(r"no space|quota", disk["error"], re.IGNORECASE):
            cure = "delete old checkpoints, or write elsewhere"
        yield Check(name, "error", value, cure=cure)
        return
    free = disk["free"] / GIB
    status = below(free, limits.disk_warning_gib, limits.disk_error_gib)
    value = f"{free:,.1f} GiB free" + ("" if disk["exists"] else f" at {disk['at']}, no folder yet")
    limit = f"{limits.disk_warning_gib:g} GiB, error below {limits.disk_error_gib:g} GiB"
    cure = "" if status == "ok" else "delete old checkpoints, or write elsewhere"
    yield Check(name, status, value, limit, cure)
    if disk["latency_ms"]:
        median, most = disk["latency_ms"]["median"], disk["latency_ms"]["most"]
        status = above(median, limits.latency_warning_ms, limits.latency_error_ms)
        value = f"{median:.1f} ms to write, flush and read 4 KiB (most {most:.1f} ms)"
        limit = f"{limits.latency_warning_ms:g} ms, error at {limits.latency_error_ms:g} ms"
        cure = "" if status == "ok" else "is the file system's server overloaded, its network slow?"
        yield Check(f"latency {folder}", status, value, limit, cure)


def _shared_memory(look: Mapping[str, Any], limits: Limits) -> Iterator[Check]:
    shared = look["shared_memory"]
    if shared is None:
        yield Check("shared memory", "warning", "there is no /dev/shm", cure="mount a tmpfs there")
        return
    free = shared["free"] / GIB
    low, lowest = limits.shared_memory_warning_gib, limits.shared_memory_error_gib
    status = below(free, low, lowest)
    value = f"{free:,.1f} of {shared['total'] / GIB:,.1f} GiB free in /dev/shm"
    cure = "mount -o remount,size=50% /dev/shm; in a container --shm-size=64g"
    cure = "" if status == "ok" else f"{cure}; delete files that ended processes left there"
    yield Check("shared memory", status, value, f"{low:g} GiB, error below {lowest:g} GiB", cure)


def _user_limits(look: Mapping[str, Any], limits: Limits) -> Iterator[Check]:
    files = look["limits"]["nofile"]
    few = files != UNLIMITED and files < limits.open_files
    cure = "`* - nofile 1048576` in /etc/security/limits.conf, then log in anew" if few else ""
    value = "unlimited" if files == UNLIMITED else f"{files:,} at a time"
    status: Status = "warning" if few else "ok"
    yield Check("open files", status, value, f"{limits.open_files:,.0f}", cure)
    locked = look["limits"]["memlock"]
    value = "unlimited" if locked == UNLIMITED else f"{locked / GIB:.3g} GiB"
    if not look["infiniband"]:
        yield Check("locked memory", "ok", f"{value}, no InfiniBand")
    elif locked == UNLIMITED or locked / GIB >= limits.locked_memory_gib:
        yield Check("locked memory", "ok", value)
    else:
        cure = "`* - memlock unlimited` in /etc/security/limits.conf: InfiniBand locks its buffers"
        limit = f"{limits.locked_memory_gib:g} GiB"
        yield Check("locked memory", "error", value, limit, cure)
