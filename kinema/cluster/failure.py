"""Which rank failed first: what torchrun reports at its end, from all hosts together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):\n\[\d+\]:\n"
    r"\s+time\s+: (?P<time>\S+)\n\s+host\s+: .*\n"
    r"\s+rank\s+: (?P<rank>\d+) \(local_rank: \d+\)\n"
    r"\s+exitcode\s+: (?P<code>-?\d+)"
)
# What a rank says when another one went away: it is not the one at fault.
_BEREFT = re.compile(
    r"Connection (closed|reset) by peer|connection was broken|remote process (has )?exited|"
    r"Socket Timeout|NCCL (communicator was )?abort|ncclRemoteError|"
    r"recvBytes|failed to recv|Broken pipe|TCPStore",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """The first rank of a host that failed, as its torchrun saw it."""

    host: str
    rank: int
    code: int
    """Exit code; below 0: the signal that ended it."""
    time: str

    def __str__(self) -> str:
        how = f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        return f"{self.host}, rank {self.rank} ({how})"


def reported(host: str, torchrun_lines: Sequence[str]) -> Failure | None:
    """What a host's torchrun gives as the root cause."""
    found = list(_CAUSE.finditer("\n".join(torchrun_lines)))
    if not found:
        return None
    last = found[-1]
    return Failure(host, int(last["rank"]), int(last["code"]), last["time"])


def culprit(failures: Sequence[tuple[Failure, Sequence[str]]]) -> Failure | None:
    """Of each host's first failure, with the last lines of that rank, the one that began it.

    Ranks that only lost another one come after those with a reason of their own; the rest is by
    time.
    """
    ordered = sorted(
        failures, key=lambda f: (bool(_BEREFT.search("\n".join(f[1]))), f[0].time, f[0].rank)
    )
    return ordered[0][0] if ordered else None
