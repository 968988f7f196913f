"""What is said at each logged step: means over the steps since the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Window:
    """Sums over all ranks and over the steps since the last logged one.

    Saved with a checkpoint, so that a resumed run logs what an uninterrupted one does.
    """

    losses: dict[str, float] = field(default_factory=dict)
    """Sum of the micro-batches' losses, by bucket."""
    micro_batches: dict[str, int] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    """Sums of what the task reports besides its loss."""
    unreadable: int = 0
    """Clips left out because their file could not be read."""
    grad_norm: float = 0.0
    """Sum over steps, before clipping."""
    steps: int = 0
    """Updates made."""

    def add(self, seen: Mapping[str, float], *, grad_norm: float | None) -> None:
        """Add a step.

        Args:
            seen: sums over ranks: `loss/BUCKET`, `count/BUCKET`, `part/NAME`,
                `unreadable`; other keys do not count.
            grad_norm: None where fp16 overflowed.
        """
        for key, value in seen.items():
            kind, _, name = key.partition("/")
            if kind == "count" and value:
                self.micro_batches[name] = self.micro_batches.get(name, 0) + int(value)
                self.losses[name] = self.losses.get(name, 0.0) + seen[f"loss/{name}"]
            elif kind == "part":
                self.parts[name] = self.parts.get(name, 0.0) + value
        self.unreadable += int(seen["unreadable"])
        if grad_norm is not None:
            self.grad_norm += grad_norm
            self.steps += 1

    def record(self) -> dict[str, Any]:
        """`loss` (each micro-batch weighs the same), `loss/BUCKET`, parts, `grad_norm`."""
        count = sum(self.micro_batches.values())
        result: dict[str, Any] = {"loss": _mean(sum(self.losses.values()), count)}
        result |= {name: _mean(value, count) for name, value in self.parts.items()}
        result["grad_norm"] = _mean(self.grad_norm, self.steps)
        for bucket in sorted(self.losses):
            result[f"loss/{bucket}"] = _mean(self.losses[bucket], self.micro_batches[bucket])
        if self.unreadable:
            result["unreadable"] = self.unreadable
        return result

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Window:
        return cls(**state)


def _mean(total: float, count: int) -> float:
    return total / count if count else float("nan")
