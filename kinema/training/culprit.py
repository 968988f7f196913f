"""Which process of a run that stands still the others wait for. Pure, and without torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from kinema.training.heartbeat import END, LONG_PHASES, PHASES, State

Process = str
"""`running`, `stopped` (SIGSTOP, a debugger), `uninterruptible` (in the kernel: a disk, a driver)
or `dead`."""

AFFECTED = ("stopped", "dead")
WORST_FIRST = ("dead", "stopped", "uninterruptible", "running")


@dataclass(frozen=True)
class Limits:
    """How long a process may go without progress, in seconds.

    Attributes:
        step: within a step.
        first: until the first step is done, while something is compiled, and in phases that are
            no part of a step (saving, previews).
        data: while a micro-batch is awaited, whose clips have time limits of their own.
    """

    step: float
    first: float
    data: float

    def of(self, state: State) -> float:
        """For what a process is doing: also five times what its work should take."""
        if state.first or state.phase in LONG_PHASES:
            return self.first
        if state.phase == "data":
            return max(self.step, self.data)
        return max(self.step, 5.0 * state.expected_s)


@dataclass(frozen=True)
class Seen:
    """A process as a watchdog sees it.

    Attributes:
        idle_s: seconds without progress.
        limit_s: seconds that it may go without.
    """

    state: State
    node: int
    host: str
    idle_s: float
    limit_s: float
    process: Process = "running"

    @property
    def position(self) -> tuple[int, int, int]:
        """How far it is: all ranks go through the same places in the same order."""
        return self.state.turn, self.state.micro, self.state.order


@dataclass(frozen=True)
class Evidence:
    """What was found out about a process once the run stood still.

    Attributes:
        in_collective: its stack is inside a collective operation; None: no stack.
        enqueued: collectives that it has begun, of all groups; None: it did not answer.
        started: those of them that run or have run, where the backend knows.
        decoding: what its decode workers are at: (pid, file, seconds).
        at: the innermost Python function of its main thread.
    """

    in_collective: bool | None = None
    enqueued: int | None = None
    started: int | None = None
    decoding: list[tuple[int, str, float]] = field(default_factory=list)
    at: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What to tell: the process at fault, or None where none can be named, and why."""

    culprit: Seen | None
    reason: str
    file: str | None = None
    """The file that its decode worker is on."""

    def __str__(self) -> str:
        if self.culprit is None:
            return self.reason
        one = self.culprit
        where = f"rank {one.state.rank} (node {one.node} {one.host}, pid {one.state.pid})"
        return f"{where} {self.reason}"


def suspects(seen: Sequence[Seen]) -> list[Seen]:
    """Processes that others wait for and that had their time; empty: the run may go on.

    A process that waits for another has got further than that one, or just as far. So only those
    that are furthest behind count, whatever the others wait in. Rank 0 may save or preview for
    long: then it is the one behind, and has the long limit.
    """
    seen = [s for s in seen if s.state.phase != END]
    if not seen:
        return []
    held = [s for s in seen if s.process in AFFECTED and s.idle_s > s.limit_s]
    if held:
        return held
    behind = min(s.position for s in seen)
    return [s for s in seen if s.position == behind and s.idle_s > s.limit_s]


def silent(heard_s: dict[int, float], nodes: int, *, limit_s: float) -> list[int]:
    """Nodes whose watchdog is not heard of.

    Args:
        heard_s: seconds since each node's last word.
        nodes: how many there are.
        limit_s: more than this is silence; a node that never spoke is missing in `heard_s` and
            counts as soon as the caller has waited as long itself.
    """
    return [n for n in range(nodes) if heard_s.get(n, float("inf")) > limit_s]


def judge(
    seen: Sequence[Seen], evidence: dict[int, Evidence], missing: Collection[int] = ()
) -> Verdict:
    """Name the culprit.

    Args:
        seen: all processes that any watchdog sees, some of them stalled.
        evidence: by rank.
        missing: nodes that are silent.
    """
    if missing:
        names = ", ".join(map(str, sorted(missing)))
        return Verdict(None, f"node {names} does not answer: its machine or its network is gone")
    chosen = suspects(seen)
    assert chosen, "nothing stalled"

    def blame(one: Seen) -> tuple[int, float, float, int, float, int]:
        found = evidence.get(one.state.rank, Evidence())
        never = -1.0  # a process that does not answer is worse off than any that does
        return (
            WORST_FIRST.index(one.process),
            never if found.enqueued is None else found.enqueued,
            never if found.started is None else found.started,
            2 if found.in_collective else 1,
            -one.idle_s,
            one.state.rank,
        )

    chosen.sort(key=blame)
    worst = chosen[0]
    found = evidence.get(worst.state.rank, Evidence())
    alike = [one for one in chosen if blame(one)[:4] == blame(worst)[:4]]
    if worst.process == "running" and found.in_collective and len(alike) == len(seen) > 1:
        return Verdict(
            None,
            f"every rank waits in a collective operation (phase {_phase(worst)}): the network "
            "between them, or one rank that took another path; compare the flight records",
        )
    return _verdict(worst, found)


def _verdict(one: Seen, found: Evidence) -> Verdict:
    since = f"for {one.idle_s:.0f} s"
    held = {
        "dead": "is dead",
        "stopped": "is stopped (SIGSTOP or a debugger)",
        "uninterruptible": "hangs in the kernel (a disk, a file system or a driver)",
    }.get(one.process)
    state = one.state
    if held:
        return Verdict(one, f"{held}, in phase {_phase(one)} of step {state.step}, {since}")
    if state.phase == "data" and found.decoding:
        pid, file, _ = max(found.decoding, key=lambda d: d[2])
        text = f"waits for data {since}, in step {state.step}: decode worker {pid} is on {file}"
        return Verdict(one, text, file)
    if state.phase == "data":
        return Verdict(one, f"waits for data {since}, in step {state.step}")
    inside = f", in {found.at}" if found.at else ""
    return Verdict(one, f"has been in phase {_phase(one)} of step {state.step} {since}{inside}")


def _phase(one: Seen) -> str:
    return one.state.phase or f"after {PHASES[one.state.order]}"
