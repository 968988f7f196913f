"""Checks of a node's links: NVLink, InfiniBand, Ethernet, and the GPU's way to the network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kinema.cluster import gpu
from kinema.cluster.gpu import UnreadableError
from kinema.cluster.verdict import Check

PORT_CURE = "cable and transceiver at both ends; ibdiagnet; compare with a good port"

UNKNOWN_SPEED = 2**32 - 1
"""Some drivers' -1."""


def check(look: Mapping[str, Any]) -> Iterator[Check]:
    """Checks of one node alone; what only a comparison shows is in `same.py`."""
    yield from _nvlink(look)
    yield from _infiniband(look)
    yield from _ethernet(look)
    ports = [p for p in look["infiniband"] if "ACTIVE" in (p["state"] or "")]
    if ports and look["gpu"]["problem"] is None:
        if look["modules"]:
            yield Check("gpudirect", "ok", f"{look['modules'][0]} is loaded")
        else:
            cure = "sudo modprobe nvidia_peermem; with open kernel modules DMA-BUF does as well"
            yield Check("gpudirect", "warning", "nvidia_peermem is not loaded", cure=cure)


def nvlink_rates(look: Mapping[str, Any]) -> dict[int, list[float]]:
    """GPU -> GB/s of its active links; empty without NVLink."""
    said = look["nvlink"]
    if said is None or said["problem"]:
        return {}
    links = gpu.nvlinks(said["text"])
    active = {index: [rate for rate in rates if rate] for index, rates in links.items()}
    return active if any(active.values()) else {}


def rate_gbit_s(port: Mapping[str, Any]) -> float | None:
    """Of an InfiniBand port: `400 Gb/sec (4X NDR)`.

    Raises:
        UnreadableError: it is written in another way.
    """
    text = port["rate"]
    if not text:
        return None
    match = re.match(r"([\d.]+) Gb/sec", text)
    if match is None:
        raise UnreadableError(text)
    return float(match.group(1))


def speed_mbit_s(card: Mapping[str, Any]) -> float | None:
    """Of a network card; None where the link is down or the driver does not say."""
    try:
        speed = float(card["speed"])
    except (TypeError, ValueError):
        return None
    return speed if 0 < speed < UNKNOWN_SPEED else None


def counters(port: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(text) for name, text in port["counters"].items() if text.isdecimal()}


def _nvlink(look: Mapping[str, Any]) -> Iterator[Check]:
    said = look["nvlink"]
    if said is None or said["problem"]:
        return  # this GPU or driver has none
    try:
        active = nvlink_rates(look)
        every = gpu.nvlinks(said["text"])
        errors = gpu.nvlink_errors(look["nvlink_errors"]["text"])
    except UnreadableError as error:
        yield Check("nvlink", "warning", f"nvidia-smi nvlink --status {error}")
        return
    if not active:
        return
    most = max(len(rates) for rates in active.values())
    fastest = max(rate for rates in active.values() for rate in rates)
    bad = False
    for index, rates in active.items():
        slow = [rate for rate in rates if rate < 0.99 * fastest]
        if len(rates) < most or slow:
            bad = True
            value = f"{len(rates)} of {len(every[index])} links active"
            value += f", {len(slow)} of them at {min(slow):g} GB/s" if slow else ""
            cure = f"nvidia-smi nvlink -e -i {index}; reset the GPUs; then bridge, board, NVSwitch"
            limit = f"{most} links of {fastest:g} GB/s as on the other GPUs"
            yield Check(f"nvlink gpu {index}", "error", value, limit, cure)
        if errors.get(index):
            value = f"{errors[index]} errors since the driver was loaded"
            cure = f"nvidia-smi nvlink -e -i {index}; if they grow: bridge, board, NVSwitch"
            yield Check(f"nvlink gpu {index} errors", "warning", value, "0", cure)
    if not bad:
        value = f"{most} links of {fastest:g} GB/s on each of {len(active)} GPUs"
        yield Check("nvlink", "ok", value)


def _infiniband(look: Mapping[str, Any]) -> Iterator[Check]:
    for port in look["infiniband"]:
        name = f"infiniband {port['port']}"
        state = (port["state"] or "?").split(": ")[-1]
        physical = (port["phys_state"] or "?").split(": ")[-1]
        value = f"{state}, {physical}, {port['rate'] or 'no rate'}"
        try:
            rate_gbit_s(port)
        except UnreadableError as error:
            yield Check(name, "warning", f"rate {error}")
            continue
        if state == "INIT" and physical == "LinkUp":
            cure = "no subnet manager answers: start opensm, or the switch's own"
            yield Check(name, "error", value, "ACTIVE", cure)
        elif state == "ACTIVE" or physical in ("Disabled", "Polling", "Sleep"):
            yield Check(name, "ok", value)  # a port without a cable: `same.py` compares
        else:
            yield Check(name, "error", value, "ACTIVE", PORT_CURE)
        errors = {key: count for key, count in counters(port).items() if count}
        if errors:
            text = ", ".join(f"{key} {count}" for key, count in errors.items())
            cure = "health --every shows whether they grow; if so: " + PORT_CURE
            yield Check(f"{name} errors", "warning", text, "0", cure)


def _ethernet(look: Mapping[str, Any]) -> Iterator[Check]:
    for card in look["ethernet"]:
        speed = speed_mbit_s(card)
        value = f"{card['state'] or '?'}" + (f", {speed:,.0f} Mb/s" if speed else "")
        yield Check(f"ethernet {card['name']}", "ok", value)
