"""What a rank is doing, where another process can read it even while this one is frozen.

Each rank has one small memory-mapped file in a private folder of its machine. Writing is two
copies in memory and costs some microseconds; reading needs neither torch nor the rank's help.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SLOT = 1 << 15
"""Bytes of each of the two places that states are written to in turn."""
_HEAD = struct.Struct("<QII")  # number, length, checksum
_ASK_AT = 2 * SLOT
MOST_CLIPS = 64
"""Files that a state names; a micro-batch may have more."""

PHASES = (
    *("start", "warm up", "data", "share", "text", "vae", "forward", "backward"),
    *("reduce", "optimizer", "agree", "save", "preview", "validation", "order"),
)
"""In the order of a step: a rank that others wait for is not further than they are. Last, an epoch
is over and the `order` of the next one is laid out."""

END = "end"
"""The phase of a process that has come to the end of the run."""

LONG_PHASES = frozenset({"start", "warm up", "save", "preview", "validation", "order"})
"""Phases that are no part of a step: they may take as long as the first step."""


@dataclass
class State:
    """What a rank says of itself.

    Attributes:
        beat: seconds of the machine's monotonic clock (it stands still while a laptop sleeps) at
            the last sign of progress.
        phase: the innermost open phase (`Spans`); "" between phases.
        order: place of the last phase in `PHASES`.
        turn: steps begun by this process, the same number on every rank.
        micro: micro-batch of the step, from 0.
        step: optimizer updates made.
        bucket, clips, count: the micro-batch in hand: its bucket, some of its files, all of them.
        expected_s: how long the work in hand should take, from what such work took so far.
        first: no step is done yet, or the work in hand is compiled first.
        own_s: seconds of this process's own work so far, waiting left out.
    """

    rank: int
    pid: int
    beat: float = 0.0
    phase: str = "start"
    order: int = 0
    turn: int = 0
    micro: int = 0
    step: int = 0
    bucket: str = ""
    clips: list[str] = field(default_factory=list)
    count: int = 0
    expected_s: float = 0.0
    first: bool = True
    own_s: float = 0.0


class Heartbeat:
    """The writing side, in the rank; for its main thread alone.

    Args:
        path: of the file, in a folder that only this user can open.
        rank: of this process.
    """

    def __init__(self, path: Path, rank: int) -> None:
        with path.open("wb") as file:
            file.truncate(2 * SLOT + 1)
        self.state = State(rank=rank, pid=os.getpid())
        self._map = _open_map(path)
        self._number = 0
        self.beat()

    def enter(self, phase: str) -> None:
        """A phase began; "" is none. For `Spans.on_enter`."""
        self.state.phase = phase
        if phase in PHASES:
            self.state.order = PHASES.index(phase)
        self.beat()

    def turn(self, step: int) -> None:
        """A step begins.

        Args:
            step: updates made so far.
        """
        state = self.state
        state.turn += 1
        state.first = state.turn == 1
        state.step, state.micro, state.order, state.expected_s = step, 0, 0, 0.0
        self.beat()

    def await_micro(self, micro: int) -> None:
        """The `micro`-th micro-batch of the step, from 0, is awaited."""
        self.state.micro = micro
        self.beat()

    def hold(self, bucket: str, clips: Sequence[str], *, expected_s: float, first: bool) -> None:
        """A micro-batch is at hand.

        Args:
            clips: its files.
            expected_s: seconds that its work should take; 0 where nothing is known yet.
            first: nothing like it was done before, so that it may take much longer.
        """
        state = self.state
        state.bucket = bucket
        state.clips, state.count = list(clips[:MOST_CLIPS]), len(clips)
        state.expected_s, state.first = expected_s, first
        self.beat()

    def beat(self) -> None:
        """A sign of progress: publish the state, with the time of now."""
        self.state.beat = time.monotonic()
        # Not `asdict`, which copies deeply and would take most of the time.
        text = json.dumps(self.state.__dict__).encode()
        if len(text) > SLOT - _HEAD.size:  # very long names of files
            text = json.dumps({**self.state.__dict__, "clips": []}).encode()
        self._number += 1
        at = (self._number % 2) * SLOT
        # The other place stays whole, whenever this process is stopped.
        self._map[at + _HEAD.size : at + _HEAD.size + len(text)] = text
        self._map[at : at + _HEAD.size] = _HEAD.pack(self._number, len(text), zlib.crc32(text))

    @property
    def asked(self) -> int:
        """How often a reader has asked for what only this process knows (modulo 256)."""
        return self._map[_ASK_AT]

    def close(self) -> None:
        self._map.close()


class HeartbeatReader:
    """The reading side, in another process."""

    def __init__(self, path: Path) -> None:
        self._map = _open_map(path)

    def read(self) -> State | None:
        """The newest whole state; None before the first."""
        found = [one for at in (0, SLOT) if (one := self._slot(at)) is not None]
        if not found:
            return None
        values: dict[str, Any] = json.loads(max(found)[1])
        return State(**{f.name: values[f.name] for f in fields(State) if f.name in values})

    def _slot(self, at: int) -> tuple[int, bytes] | None:
        number, length, checksum = _HEAD.unpack(self._map[at : at + _HEAD.size])
        text = self._map[at + _HEAD.size : at + _HEAD.size + min(length, SLOT)]
        return (number, text) if number and zlib.crc32(text) == checksum else None

    def ask(self) -> None:
        """Ask the process for what only it knows: see `Heartbeat.asked`."""
        self._map[_ASK_AT] = (self._map[_ASK_AT] + 1) % 256

    def close(self) -> None:
        self._map.close()


def as_dict(state: State) -> dict[str, Any]:
    """JSON values."""
    return asdict(state)


def _open_map(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
