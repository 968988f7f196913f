"""Which ranks hold the others up: each one's own work, per unit of what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

OWN_PHASES = ("data", "text", "vae", "forward", "backward")
"""Phases of a step in which a rank works (or waits for its own files), not for other ranks."""
IN_A_ROW = 3
"""Log points at which a rank must be slow before it is named."""


@dataclass(frozen=True)
class Slow:
    """A rank that is slow.

    Attributes:
        factor: its work per cost over the median of all ranks.
        phase: where most of what is too much is spent.
    """

    rank: int
    factor: float
    phase: str


class SlowRanks:
    """Compares ranks at the log points of a run.

    Args:
        factor: more than so many times the median is slow.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._in_a_row: dict[int, int] = {}
        self._named: set[int] = set()

    def compare(
        self, work: Sequence[Mapping[str, float]], cost: Sequence[float]
    ) -> tuple[float | None, list[Slow]]:
        """One log point.

        Args:
            work: seconds of own work by phase, by rank, since the last log point.
            cost: of what each rank worked on since then.

        Returns:
            The slowest rank's work per cost over the median of all (None for fewer than two ranks
            with work), and the ranks that are slow now for the `IN_A_ROW`-th time in a row and
            were not named before.
        """
        rates = {
            rank: sum(phases.values()) / cost[rank]
            for rank, phases in enumerate(work)
            if cost[rank] > 0
        }
        middle = median_low(rates.values()) if rates else 0.0
        if len(rates) < 2 or middle <= 0:
            return None, []
        found = []
        for rank, rate in rates.items():
            slow = rate > self._factor * middle
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if slow else 0
            if self._in_a_row[rank] >= IN_A_ROW and rank not in self._named:
                self._named.add(rank)
                found.append(Slow(rank, rate / middle, _worst_phase(work, cost, rank)))
        return max(rates.values()) / middle, found


def _worst_phase(work: Sequence[Mapping[str, float]], cost: Sequence[float], rank: int) -> str:
    """The phase in which a rank exceeds the median of the ranks by most."""

    def excess(phase: str) -> float:
        rates = [p.get(phase, 0.0) / c for p, c in zip(work, cost, strict=True) if c > 0]
        return work[rank].get(phase, 0.0) / cost[rank] - median_low(rates)

    return max(work[rank], key=excess)
