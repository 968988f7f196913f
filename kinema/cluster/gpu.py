"""What `nvidia-smi` says, as values.

The fields are those of `nvidia-smi --help-query-gpu`; the bits of reasons are those of NVML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

USE_FIELDS = (
    *("index", "uuid", "name", "utilization.gpu", "memory.total", "memory.used"),
    *("power.draw", "power.limit", "temperature.gpu", "clocks.sm", "clocks.max.sm"),
)
HEALTH_FIELDS = (
    *USE_FIELDS,
    *("driver_version", "persistence_mode", "mig.mode.current", "ecc.mode.current"),
    *("ecc.errors.uncorrected.volatile.total", "ecc.errors.corrected.volatile.total"),
    *("ecc.errors.uncorrected.aggregate.total", "retired_pages.pending"),
    *("pcie.link.width.current", "pcie.link.width.max"),
)
THROTTLE = ["clocks_event_reasons.active", "clocks_throttle_reasons.active"]
"""The new name of the field, and the one of drivers before 535."""
ROW_FIELDS = (
    *("gpu_uuid", "remapped_rows.correctable", "remapped_rows.uncorrectable"),
    *("remapped_rows.pending", "remapped_rows.failure"),
)
APP_FIELDS = ("gpu_uuid", "pid", "used_gpu_memory", "process_name")  # a name may have commas: last

REASONS = {
    0x1: "idle",
    0x2: "clocks set by hand",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}
"""nvmlClocksEventReasons: why a GPU does not run at its highest clock."""
HARMLESS = {"idle", "clocks set by hand", "power cap", "sync boost", "display clocks"}
"""At full load the power cap is what a GPU should be held by."""

_UNKNOWN = {
    *("n/a", "not supported", "not available", "not found", "unknown error"),
    *("insufficient permissions", "requested functionality has been deprecated"),
}
BROKEN = ("err!", "gpu requires reset", "gpu is lost", "unknown error")
MIB = 2**20


class UnreadableError(Exception):
    """A tool said what nobody expects; the message is `could not be read: ` and its line."""

    def __init__(self, line: str) -> None:
        super().__init__(f"could not be read: {line.strip()[:120]!r}")


@dataclass(frozen=True)
class Gpu:
    """One GPU; None is what this GPU or driver does not say (MIG hides utilisation).

    Attributes:
        memory_total, memory_used: bytes.
        throttle: why its clock is below the highest.
        broken: what nvidia-smi says in place of a value where the GPU is in trouble.
        values: all columns as text, by the field's name.
    """

    index: int
    uuid: str
    name: str
    utilisation_percent: float | None
    memory_total: float | None
    memory_used: float | None
    power_w: float | None
    power_limit_w: float | None
    temperature_c: float | None
    sm_mhz: float | None
    sm_max_mhz: float | None
    throttle: tuple[str, ...]
    broken: str | None
    values: Mapping[str, str]

    @property
    def slowed(self) -> tuple[str, ...]:
        """Reasons that something is wrong."""
        return tuple(reason for reason in self.throttle if reason not in HARMLESS)


@dataclass(frozen=True)
class App:
    """A process on a GPU; `memory` in bytes, None where the driver does not say."""

    uuid: str
    pid: int
    memory: float | None
    name: str


def names(fields: tuple[str, ...]) -> list[list[str]]:
    """Fields as `on_node.nvidia.query` wants them, each with its other names."""
    return [[field] for field in fields] + ([THROTTLE] if fields is not APP_FIELDS else [])


def rows_names() -> list[list[str]]:
    return [[field] for field in ROW_FIELDS]


def app_names() -> list[list[str]]:
    return [[field] for field in APP_FIELDS]


def number(text: str) -> float | None:
    """A number; None for `[N/A]` and its like.

    Raises:
        UnreadableError: it is neither.
    """
    plain = text.strip().strip("[]").lower()
    if plain in _UNKNOWN or plain in BROKEN or not plain:
        return None
    try:
        return float(plain)
    except ValueError:
        raise UnreadableError(text) from None


def table(said: Mapping[str, Any]) -> list[dict[str, str]]:
    """The rows of a query's CSV.

    Raises:
        UnreadableError: another number of columns than fields.
    """
    fields = said["fields"]
    rows = []
    for line in said["text"].splitlines():
        # "No running processes found" and the like come on a line of their own.
        if not line.strip() or (line.lower().startswith("no ") and "found" in line):
            continue
        cells = [cell.strip() for cell in line.split(",", len(fields) - 1)]
        if len(cells) != len(fields):
            raise UnreadableError(line)
        rows.append(dict(zip(fields, cells, strict=True)))
    return rows


def gpus(said: Mapping[str, Any]) -> list[Gpu]:
    """GPUs of a node.

    Raises:
        UnreadableError: the tool's output is none that is known.
    """
    return [_gpu(row) for row in table(said)]


def _gpu(row: dict[str, str]) -> Gpu:
    def value(field: str) -> float | None:
        return number(row.get(field, "[N/A]"))

    index = value("index")
    if index is None:
        raise UnreadableError(", ".join(row.values()))
    total, used = value("memory.total"), value("memory.used")
    signs = [cell for cell in row.values() if cell.strip("[]").lower() in BROKEN]
    return Gpu(
        index=int(index),
        uuid=row.get("uuid", ""),
        name=row.get("name", ""),
        utilisation_percent=value("utilization.gpu"),
        memory_total=None if total is None else total * MIB,
        memory_used=None if used is None else used * MIB,
        power_w=value("power.draw"),
        power_limit_w=value("power.limit"),
        temperature_c=value("temperature.gpu"),
        sm_mhz=value("clocks.sm"),
        sm_max_mhz=value("clocks.max.sm"),
        throttle=throttle(row.get(THROTTLE[0], "[N/A]")),
        broken=signs[0].strip("[]") if signs else None,
        values=row,
    )


def throttle(text: str) -> tuple[str, ...]:
    """The reasons in a mask like `0x0000000000000044`.

    Raises:
        UnreadableError: it is no such number.
    """
    if not text.startswith("0x"):
        number(text)
        return ()
    try:
        mask = int(text, 16)
    except ValueError:
        raise UnreadableError(text) from None
    known = [name for bit, name in REASONS.items() if mask & bit]
    rest = mask & ~sum(REASONS)
    return (*known, *([f"reason {rest:#x}"] if rest else []))


def apps(said: Mapping[str, Any], listing: str) -> list[App]:
    """Processes on GPUs, each with the GPU's identifier, also where it sits on a slice of one.

    Args:
        listing: `nvidia-smi -L`, for slices.

    Raises:
        UnreadableError: the tool's output is none that is known.
    """
    owner = slices(listing)
    found = []
    for row in table(said):
        pid = number(row["pid"])
        memory = number(row["used_gpu_memory"])
        if pid is None:
            raise UnreadableError(", ".join(row.values()))
        uuid = owner.get(row["gpu_uuid"], row["gpu_uuid"])
        size = None if memory is None else memory * MIB
        found.append(App(uuid, int(pid), size, row["process_name"]))
    return found


def slices(listing: str) -> dict[str, str]:
    """MIG slice -> GPU, from `nvidia-smi -L`: a GPU's line, then its slices', each with a UUID."""
    found: dict[str, str] = {}
    gpu = ""
    for uuid in re.findall(r"UUID: ([\w./-]+)", listing):
        if uuid.startswith("MIG-"):
            found[uuid] = gpu
        else:
            gpu = uuid
    return found


def nvlinks(text: str) -> dict[int, list[float | None]]:
    """GPU -> GB/s of each of its links, None for an inactive one; from `nvlink --status`."""
    found: dict[int, list[float | None]] = {}
    gpu: int | None = None
    for line in text.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            gpu = int(head.group(1))
            found[gpu] = []
        elif gpu is not None and (link := re.match(r"\s*Link \d+: (.+)", line)):
            speed = re.match(r"([\d.]+) GB/s", link.group(1))
            if speed is None and "inactive" not in link.group(1).lower():
                raise UnreadableError(line)
            found[gpu].append(float(speed.group(1)) if speed else None)
    return found


def nvlink_errors(text: str) -> dict[int, int]:
    """GPU -> sum of all error counters of its links; from `nvlink -e`."""
    found: dict[int, int] = {}
    gpu: int | None = None
    for line in text.splitlines():
        if head := re.match(r"GPU (\d+):", line):
            gpu = int(head.group(1))
        elif gpu is not None and (count := re.match(r"\s*Link \d+: .*Errors?: (\d+)\s*$", line)):
            found[gpu] = found.get(gpu, 0) + int(count.group(1))
    return found
