"""Where the time of a step goes, from a trace of `torch.profiler` (Chrome's format).

The steps' time is dealt out so that every moment counts once, for the first in this list that has
something to do at that moment:

kernel          kernels that compute, on the GPU
communication   collectives that no kernel hides (on the CPU: all of them)
memory copy     copies, on the GPU or, without one, on the CPU
memory set      filling memory, likewise
loader          the loop waits for data
CPU             operators and calls of the CUDA runtime, on any thread of the process
other           the rest: Python
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = ("kernel", "communication", "memory copy", "memory set", "loader", "CPU", "other")
STEP = re.compile(r"^ProfilerStep#\d+$")
SPAN = "kinema/"
"""Prefix of the marks that phases of the loop (`Spans`) leave in a trace."""
LOADER = "data"
"""The phase in which the loop waits for data."""

_ON_GPU = {"kernel": "kernel", "gpu_memcpy": "memory copy", "gpu_memset": "memory set"}
_ON_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")
_COLLECTIVE_KERNEL = re.compile(r"nccl", re.IGNORECASE)
_COLLECTIVE_CALL = re.compile(r"^(gloo:|nccl:|c10d::|_c10d_functional::)")
_COPY = re.compile(r"^aten::(copy_|_to_copy|clone|contiguous)$")
_SET = re.compile(r"^aten::(zero_|fill_|zeros|zeros_like|full|ones)$")

Interval = tuple[float, float]


@dataclass(frozen=True)
class Breakdown:
    """What a trace says, in seconds over all its steps.

    Attributes:
        steps: recorded.
        total: of the steps.
        rows: of `ROWS`, which add up to `total`.
        busy: likewise, with what overlaps counted in each: how long each was at work at all.
        spans: host's own time by phase of the loop, largest first.
        operators: host's own time by operator, largest first.
        gpu: whether a GPU took part.
    """

    steps: int
    total: float
    rows: dict[str, float]
    busy: dict[str, float]
    spans: dict[str, float]
    operators: dict[str, float]
    gpu: bool

    def percent(self, row: str) -> float:
        """Share of a row in the steps' time."""
        return 100.0 * self.rows[row] / self.total


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file, compressed or not."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return events


def break_down(events: Iterable[Mapping[str, Any]]) -> Breakdown:
    """Deal out the time of a trace's steps.

    Args:
        events: of Chrome's format; times in microseconds.
    """
    timed = [e for e in events if e.get("ph") == "X" and "dur" in e]
    steps = [
        _interval(e)
        for e in timed
        if STEP.match(e["name"]) and e.get("cat") in ("user_annotation", "cpu_op")
    ]
    assert steps, "a trace without steps"
    window = union(steps)
    gpu = any(e.get("cat") in _ON_GPU for e in timed)
    found: dict[str, list[Interval]] = defaultdict(list)
    spans: dict[str, float] = defaultdict(float)
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in timed:
        name, kind = event["name"], event.get("cat")
        if kind == "user_annotation" and name.startswith(SPAN):
            phase = name.removeprefix(SPAN)
            spans[phase] += length(intersect([_interval(event)], window))
            if phase == LOADER:
                found["loader"].append(_interval(event))
        row = _row(name, kind, gpu)
        if row is not None:
            found[row].append(_interval(event))
        if kind in _ON_HOST:
            threads[event.get("pid"), event.get("tid")].append(event)

    total = length(window)
    rows, busy, taken = {}, {}, list[Interval]()
    for row in ROWS[:-1]:
        mine = intersect(union(found[row]), window)
        busy[row] = length(mine)
        rows[row] = busy[row] - length(intersect(mine, taken))
        taken = union([*taken, *mine])
    rows["other"] = busy["other"] = total - length(taken)
    operators: dict[str, float] = defaultdict(float)
    for thread in threads.values():
        _add_own_times(thread, window, operators)
    return Breakdown(
        steps=len(steps),
        total=total,
        rows=rows,
        busy=busy,
        spans=_largest_first(spans),
        operators=_largest_first(operators),
        gpu=gpu,
    )


def _row(name: str, kind: str | None, gpu: bool) -> str | None:
    if kind in _ON_GPU:
        return "communication" if _COLLECTIVE_KERNEL.search(name) else _ON_GPU[kind]
    if not gpu and _COLLECTIVE_CALL.match(name):  # also as an annotation, on gloo's own threads
        return "communication"
    if kind not in _ON_HOST:
        return None
    if not gpu and _COPY.match(name):
        return "memory copy"
    if not gpu and _SET.match(name):
        return "memory set"
    return "CPU"


def _add_own_times(
    events: list[Mapping[str, Any]], window: Sequence[Interval], into: dict[str, float]
) -> None:
    """Add each event's time without that of the events inside it, on one thread."""
    first, last = window[0][0], window[-1][1]
    inner: list[tuple[float, str]] = []  # (end, name) of the events that are open
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        start, end = _interval(event)
        if end <= first or start >= last:
            continue
        while inner and inner[-1][0] <= start:
            inner.pop()
        into[event["name"]] += end - start
        if inner:
            into[inner[-1][1]] -= min(end, inner[-1][0]) - start
        inner.append((end, event["name"]))


def _interval(event: Mapping[str, Any]) -> Interval:
    """Seconds."""
    start = float(event["ts"]) / 1e6
    return start, start + float(event["dur"]) / 1e6


def _largest_first(values: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(values.items(), key=lambda item: -item[1]))


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as intervals that do not touch, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def intersect(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Moments in both; each as `union` gives them."""
    found = []
    i = j = 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
