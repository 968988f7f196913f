"""Checks of a node's GPUs, from what `on_node/look_over.py` brought."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kinema.cluster import gpu, xid
from kinema.cluster.gpu import Gpu, UnreadableError
from kinema.cluster.verdict import Check, Limits, Status

_RESET = "stop what runs on it, nvidia-smi --gpu-reset -i {index}; if it comes again, replace it"


def gpus_of(look: Mapping[str, Any]) -> list[Gpu]:
    """The GPUs of a node; none where nvidia-smi is missing or does not make sense."""
    if look["gpu"]["problem"]:
        return []
    try:
        return gpu.gpus(look["gpu"])
    except UnreadableError:
        return []


def in_use(look: Mapping[str, Any]) -> bool:
    """Whether programs run on a node's GPUs, which a measurement would disturb, and they it."""
    said = look["apps"]
    if said is None or said["problem"]:
        return False
    try:
        return bool(gpu.apps(said, ""))
    except UnreadableError:
        return False


def check(look: Mapping[str, Any], slots: int | None, limits: Limits) -> Iterator[Check]:
    """Checks of one node.

    Args:
        slots: training processes that the hostfile gives it.
    """
    said = look["gpu"]
    if said["problem"] == "not installed" and not look["pci"]:
        yield Check("gpus", "ok", "none: this node computes on its CPU")
        return
    if said["problem"]:
        cure = "install the NVIDIA driver" if said["problem"] == "not installed" else ""
        yield Check("gpus", "error", f"nvidia-smi {said['problem']}", cure=cure or _lost())
        yield from _xids(look, limits)
        return
    try:
        found = gpu.gpus(said)
    except UnreadableError as error:
        yield Check("gpus", "error", f"nvidia-smi {error}", cure="run nvidia-smi there by hand")
        return
    yield _count(found, look, slots)
    yield from _xids(look, limits)
    yield from _broken(found)
    yield from _memory_errors(found)
    yield from _rows(look, found)
    yield from _throttling(found, limits)
    yield from _setup(found)


def _lost() -> str:
    return "see gpu xid and `dmesg | grep NVRM`; restart the node"


def _count(found: Sequence[Gpu], look: Mapping[str, Any], slots: int | None) -> Check:
    wanted = max(slots or 0, len(look["pci"]))
    names = sorted({one.name for one in found})
    value = f"{len(found)} × {', '.join(names)}" if found else "none answers"
    if len(found) >= wanted and found:
        return Check("gpus", "ok", value)
    limit = f"{wanted} ({'slots' if wanted == slots else '/dev/nvidia*'})"
    return Check("gpus", "error", value, limit, "a GPU is missing: " + _lost())


def _xids(look: Mapping[str, Any], limits: Limits) -> Iterator[Check]:
    log = look["kernel_log"]
    if log["problem"]:
        cure = "sudo sysctl kernel.dmesg_restrict=0, or add the user to the group systemd-journal"
        value = f"the kernel's log could not be read: {log['problem']}"
        yield Check("gpu xid", "warning", value, cure=cure)
        return
    found = xid.read(log["text"])
    # One line for each GPU and number: a dying GPU repeats itself.
    latest = {(one.device, one.number): one for one in found}
    for (device, number), one in latest.items():
        count = sum(1 for other in found if (other.device, other.number) == (device, number))
        up = look["uptime_s"]
        hours = None if up is None or one.at_s is None else max(up - one.at_s, 0) / 3600
        old = hours is not None and hours > limits.xid_hours
        status: Status = "error" if one.meaning.hardware and not old else "warning"
        when = "" if hours is None else f", the last {hours:.1f} h ago"
        times = f"{count} times" if count > 1 else "once"
        value = f"Xid {number} on {device} {times}{when}: {one.meaning.what}"
        yield Check(f"gpu xid {device} {number}", status, value, cure=one.meaning.cure)
    if not found:
        yield Check("gpu xid", "ok", "no Xid error since the node started")


def _broken(found: Sequence[Gpu]) -> Iterator[Check]:
    for one in found:
        if one.broken:
            value = f"nvidia-smi says {one.broken!r}"
            cure = _RESET.format(index=one.index)
            yield Check(f"gpu {one.index} answers", "error", value, cure=cure)


def _value(one: Gpu, field: str) -> float | None:
    try:
        return gpu.number(one.values.get(field, "[N/A]"))
    except UnreadableError:
        return None


def _memory_errors(found: Sequence[Gpu]) -> Iterator[Check]:
    bad = False
    for one in found:
        since_start = _value(one, "ecc.errors.uncorrected.volatile.total")
        ever = _value(one, "ecc.errors.uncorrected.aggregate.total")
        cure = _RESET.format(index=one.index)
        name = f"gpu {one.index} ecc"
        if since_start:
            value = f"{since_start:.0f} uncorrected memory errors since the driver was loaded"
            yield Check(name, "error", value, "0", cure)
        elif ever:
            value = f"{ever:.0f} uncorrected memory errors in its life, none since the last reset"
            yield Check(name, "warning", value, "0", "watch it; replace it if the number grows")
        elif one.values.get("retired_pages.pending") == "Yes":
            yield Check(name, "warning", "memory pages wait to be retired", cure=cure)
        bad = bad or bool(since_start or ever)
    off = [one.index for one in found if one.values.get("ecc.mode.current") == "Disabled"]
    if off:
        value = f"switched off on GPUs {', '.join(map(str, off))}"
        cure = "nvidia-smi -e 1, then restart: without it a wrong bit goes unnoticed"
        yield Check("gpu ecc", "warning", value, cure=cure)
    elif not bad:
        yield Check("gpu ecc", "ok", "no uncorrected memory error")


def _rows(look: Mapping[str, Any], found: Sequence[Gpu]) -> Iterator[Check]:
    said = look["rows"]
    if said is None or said["problem"]:
        return  # GPUs before Ampere have no spare rows
    try:
        rows = gpu.table(said)
    except UnreadableError as error:
        yield Check("gpu rows", "warning", f"nvidia-smi --query-remapped-rows {error}")
        return
    index = {one.uuid: one.index for one in found}
    for row in rows:
        number = index.get(row["gpu_uuid"], row["gpu_uuid"])
        cure = _RESET.format(index=number)
        if row.get("remapped_rows.failure", "").lower() in ("yes", "1"):
            value = "a bad memory row could not be replaced"
            yield Check(f"gpu {number} rows", "error", value, cure="have the GPU replaced")
        elif row.get("remapped_rows.pending", "").lower() in ("yes", "1"):
            value = "a bad memory row waits for its spare one"
            yield Check(f"gpu {number} rows", "warning", value, cure=cure)


def _throttling(found: Sequence[Gpu], limits: Limits) -> Iterator[Check]:
    bad = False
    for one in found:
        hot = one.temperature_c is not None and one.temperature_c > limits.temperature_c
        if one.slowed or hot:
            bad = True
            value = f"{_shown(one.temperature_c, ' °C')}, {_shown(one.sm_mhz, ' MHz')}"
            value += f" of {_shown(one.sm_max_mhz, ' MHz')}: {', '.join(one.slowed) or 'hot'}"
            limit = f"{limits.temperature_c:g} °C, not slowed"
            cure = "fans, air flow, room; for a power brake: supplies and cables"
            yield Check(f"gpu {one.index} throttling", "warning", value, limit, cure)
    if not bad:
        hottest = max((one.temperature_c or 0 for one in found), default=0)
        yield Check("gpu throttling", "ok", f"none; hottest {hottest:.0f} °C")


def _setup(found: Sequence[Gpu]) -> Iterator[Check]:
    loose = [i for i in found if i.values.get("persistence_mode") == "Disabled"]
    if loose:
        value = "off: the driver is unloaded between jobs, starting takes seconds longer"
        yield Check("gpu persistence", "warning", value, cure="sudo nvidia-smi -pm 1")
    for one in found:
        now, most = _value(one, "pcie.link.width.current"), _value(one, "pcie.link.width.max")
        if now is not None and most is not None and now < most:
            value = f"×{now:.0f} of ×{most:.0f} lanes"
            cure = "seat the GPU or its riser anew; BIOS"
            yield Check(f"gpu {one.index} pcie", "warning", value, f"×{most:.0f}", cure)
    sliced = [one.index for one in found if one.values.get("mig.mode.current") == "Enabled"]
    if sliced:
        value = f"GPUs {', '.join(map(str, sliced))} are cut into slices"
        cure = "sudo nvidia-smi -mig 0: NCCL does not work between slices"
        yield Check("gpu mig", "warning", value, cure=cure)


def _shown(value: float | None, unit: str) -> str:
    return "?" if value is None else f"{value:.0f}{unit}"
