"""What a check came to, and what checks come to together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, TypeVar

from kinema.config.errors import KinemaError

Status = Literal["ok", "warning", "error"]
STATUSES: tuple[Status, ...] = ("ok", "warning", "error")
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at on one node.

    Attributes:
        name: the same on every node and in every round.
        value: what was measured.
        limit: what it is measured by.
        cure: what to do; empty if nothing.
    """

    name: str
    status: Status
    value: str
    limit: str = ""
    cure: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.name}: {self.value}"
        text += f" (limit {self.limit})" if self.limit and self.status != "ok" else ""
        return f"{text} -> {self.cure}" if self.cure else text


@dataclass(frozen=True)
class Limits:
    """What counts as wrong; each may be set: `--limit skew_error_ms=100`.

    Attributes:
        skew_warning_ms, skew_error_ms: between a node's clock and the middle of all clocks.
        disk_warning_gib, disk_error_gib: free where outputs and data are.
        latency_warning_ms, latency_error_ms: median of writing, flushing and reading 4 KiB there.
        shared_memory_warning_gib, shared_memory_error_gib: free in /dev/shm, where data workers
            hand over frames.
        open_files: that a process may have.
        locked_memory_gib: that a process on a node with InfiniBand may lock.
        temperature_c: of a GPU.
        xid_hours: an older Xid error is a warning only.
        bandwidth_part: of the median over nodes, that a node has to reach in pairs.
    """

    skew_warning_ms: float = 20
    skew_error_ms: float = 500
    disk_warning_gib: float = 100
    disk_error_gib: float = 10
    latency_warning_ms: float = 100
    latency_error_ms: float = 2000
    shared_memory_warning_gib: float = 8
    shared_memory_error_gib: float = 1
    open_files: float = 65536
    locked_memory_gib: float = 64
    temperature_c: float = 87
    xid_hours: float = 24
    bandwidth_part: float = 0.8

    def with_given(self, words: Iterable[str]) -> Limits:
        """These, with `name=value` of each word.

        Raises:
            KinemaError: no such limit, or not a number.
        """
        given: dict[str, float] = {}
        for word in words:
            name, _, value = word.partition("=")
            known = [field.name for field in fields(self)]
            if name not in known:
                hint = "one of " + ", ".join(known)
                raise KinemaError(f"no limit {name!r}", where="--limit", hint=hint)
            try:
                given[name] = float(value)
            except ValueError:
                hint = f"--limit {name}={getattr(self, name):g}"
                raise KinemaError(f"{word!r} has no number", where="--limit", hint=hint) from None
        return replace(self, **given)


def worst(checks: Iterable[Check]) -> Status:
    """The gravest status; "ok" of none."""
    return max((check.status for check in checks), key=STATUSES.index, default="ok")


def passed(statuses: Iterable[Status], *, strict: bool) -> bool:
    """Whether training may start: no error, and if `strict` no warning."""
    return not set(statuses) & ({"error", "warning"} if strict else {"error"})


def above(value: float, warning: float, error: float) -> Status:
    """The status of a value that should be small."""
    return "error" if value > error else "warning" if value > warning else "ok"


def below(value: float, warning: float, error: float) -> Status:
    """The status of a value that should be large."""
    return "error" if value < error else "warning" if value < warning else "ok"


def most_have(values: Mapping[str, T]) -> T:
    """The value that most nodes have; of equally many, that of the node that is listed first."""
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], -list(values.values()).index(value)))


def listed(names: Iterable[str], most: int = 3) -> str:
    """`node1, node2 and 5 more`."""
    names = list(names)
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
