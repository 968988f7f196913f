"""The figures of a node that `health --every` keeps, and how each of them gets worse.

A name is its device and what it is of it: `gpu0/power_w`, `infiniband/mlx5_0:1/rate_gbit_s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kinema.cluster import gpu, link_checks, xid
from kinema.cluster.clocks import Clock
from kinema.cluster.gpu import UnreadableError
from kinema.cluster.gpu_checks import gpus_of

BUSY_PERCENT = 50.0
"""A GPU that does less than that lowers its clock by itself."""
GIB = 2**30


@dataclass(frozen=True)
class Kind:
    """How a figure is judged against its past.

    Attributes:
        how: a level is worse on one side of what is usual (falls, rises); a rate is worse below
            the best there was; a count is worse when it grows.
        least: change of a level that is no news, however steady it was.
        relative: `least` is a part of the usual value.
        always: that it is not reported any more is news too.
    """

    label: str
    how: Literal["falls", "rises", "rate", "count"]
    unit: str = ""
    least: float = 0.0
    relative: bool = False
    always: bool = True


KINDS: dict[str, Kind] = {
    "power_w": Kind("power", "falls", "W", 0.15, relative=True),
    "temperature_c": Kind("temperature", "rises", "°C", 8),
    "sm_mhz": Kind("clock under load", "falls", "MHz", 0.05, relative=True, always=False),
    "nvlink_gb_s": Kind("NVLink", "rate", "GB/s"),
    "rate_gbit_s": Kind("link rate", "rate", "Gb/s"),
    "speed_mbit_s": Kind("link speed", "rate", "Mb/s"),
    "errors": Kind("errors", "count"),
    "changes": Kind("link changes", "count"),
    "skew_ms": Kind("clock skew", "rises", "ms", 5, always=False),
    "latency_ms": Kind("file system latency", "rises", "ms", 20, always=False),
}


def kind_of(name: str) -> Kind:
    return KINDS[name.rpartition("/")[2]]


def readings(look: Mapping[str, Any], apart: Clock | None) -> dict[str, float]:
    """The figures of one node now.

    Args:
        look: from `on_node/look_over.py`.
        apart: from `clocks.against_the_middle`; None where it was not measured.
    """
    found: dict[str, float | None] = {}
    for one in gpus_of(look):
        found[f"gpu{one.index}/power_w"] = one.power_w
        found[f"gpu{one.index}/temperature_c"] = one.temperature_c
        if (one.utilisation_percent or 0) >= BUSY_PERCENT:
            found[f"gpu{one.index}/sm_mhz"] = one.sm_mhz
        try:
            corrected = one.values.get("ecc.errors.corrected.volatile.total", "")
            uncorrected = one.values.get("ecc.errors.uncorrected.volatile.total", "")
            found[f"gpu{one.index}/ecc corrected/errors"] = gpu.number(corrected)
            found[f"gpu{one.index}/ecc uncorrected/errors"] = gpu.number(uncorrected)
        except UnreadableError:
            pass  # a check says so
    if look["kernel_log"]["problem"] is None:
        found["xid/errors"] = float(len(xid.read(look["kernel_log"]["text"])))
    try:
        for index, rates in link_checks.nvlink_rates(look).items():
            found[f"gpu{index}/nvlink_gb_s"] = sum(rates)
        if look["nvlink_errors"] is not None:
            for index, count in gpu.nvlink_errors(look["nvlink_errors"]["text"]).items():
                found[f"gpu{index}/nvlink/errors"] = float(count)
    except UnreadableError:
        pass
    for port in look["infiniband"]:
        name = f"infiniband/{port['port']}"
        try:
            rate = link_checks.rate_gbit_s(port) or 0.0
        except UnreadableError:
            continue
        found[f"{name}/rate_gbit_s"] = rate if "ACTIVE" in (port["state"] or "") else 0.0
        found[f"{name}/errors"] = float(sum(link_checks.counters(port).values()))
    for card in look["ethernet"]:
        name = f"ethernet/{card['name']}"
        found[f"{name}/speed_mbit_s"] = link_checks.speed_mbit_s(card)
        counts = link_checks.counters(card)
        found[f"{name}/changes"] = _float(counts.pop("carrier_changes", None))
        found[f"{name}/errors"] = float(sum(counts.values()))
    for folder, disk in look["disks"].items():
        if disk["latency_ms"]:
            found[f"disk {folder}/latency_ms"] = disk["latency_ms"]["median"]
    if apart is not None:
        found["skew_ms"] = max(abs(apart.offset_s) - apart.bound_s, 0) * 1e3
    return {name: float(f"{value:.5g}") for name, value in found.items() if value is not None}


def summary(found: Mapping[str, float]) -> dict[str, float]:
    """Of a node for the run's own log: mean power, slowest links, hottest GPU."""
    short: dict[str, float] = {}
    powers = [value for name, value in found.items() if name.endswith("/power_w")]
    if powers:
        short["power_w"] = round(sum(powers) / len(powers), 1)
    hot = [value for name, value in found.items() if name.endswith("/temperature_c")]
    if hot:
        short["temperature_c"] = max(hot)
    for end in ("nvlink_gb_s", "rate_gbit_s", "speed_mbit_s"):
        rates = [value for name, value in found.items() if name.endswith("/" + end)]
        if rates:
            short[end] = min(rates)
    return short


def _float(value: int | None) -> float | None:
    return None if value is None else float(value)
