"""What is said at each logged step: means over the steps since the last one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LEVELS = 10
"""Bins of the loss by noise, from data to noise."""


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
    level_losses: dict[str, float] = field(default_factory=dict)
    """Sum of the samples' losses, by bin of noise."""
    level_samples: dict[str, float] = field(default_factory=dict)
    unreadable: int = 0
    """Clips left out because their file could not be read."""
    grad_norm: float = 0.0
    """Sum over steps, before clipping."""
    steps: int = 0
    """Updates made."""

    def add(self, seen: Mapping[str, float], *, grad_norm: float | None) -> None:
        """Add a step.

        Args:
            seen: sums over ranks: `loss/BUCKET`, `count/BUCKET`, `part/NAME`, `level loss/BIN`,
                `level count/BIN`, `unreadable`; other keys do not count.
            grad_norm: None where no update follows: fp16 overflowed, or no clip could be read.
        """
        for key, value in seen.items():
            kind, _, name = key.partition("/")
            if kind == "count" and value:
                self.micro_batches[name] = self.micro_batches.get(name, 0) + int(value)
                self.losses[name] = self.losses.get(name, 0.0) + seen[f"loss/{name}"]
            elif kind == "part":
                self.parts[name] = self.parts.get(name, 0.0) + value
            elif kind == "level count" and value:
                self.level_samples[name] = self.level_samples.get(name, 0.0) + value
                loss = seen[f"level loss/{name}"]
                self.level_losses[name] = self.level_losses.get(name, 0.0) + loss
        self.unreadable += int(seen["unreadable"])
        if grad_norm is not None:
            self.grad_norm += grad_norm
            self.steps += 1

    def record(self) -> dict[str, Any]:
        """`loss` (each micro-batch weighs the same), parts, `grad_norm`, `loss/BUCKET`,
        `loss_t/BIN` (each sample weighs the same)."""
        count = sum(self.micro_batches.values())
        result: dict[str, Any] = {"loss": _mean(sum(self.losses.values()), count)}
        result |= {name: _mean(value, count) for name, value in self.parts.items()}
        result["grad_norm"] = _mean(self.grad_norm, self.steps)
        for bucket in sorted(self.losses):
            result[f"loss/{bucket}"] = _mean(self.losses[bucket], self.micro_batches[bucket])
        for level in sorted(self.level_losses):
            result[f"loss_t/{level}"] = _mean(self.level_losses[level], self.level_samples[level])
        if self.unreadable:
            result["unreadable"] = self.unreadable
        return result

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Window:
        return cls(**state)


def level_name(level: float) -> str:
    """Name of the bin that a share of noise falls into: `0.3-0.4`.

    Args:
        level: timestep over the number of timesteps: 0 is data, 1 is noise.
    """
    index = min(int(level * LEVELS), LEVELS - 1)
    return LEVEL_NAMES[index]


LEVEL_NAMES = tuple(f"{i / LEVELS:.1f}-{(i + 1) / LEVELS:.1f}" for i in range(LEVELS))


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")
