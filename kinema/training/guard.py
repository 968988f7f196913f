"""Updates that would spoil the weights are left out; after some in a row the run goes back.

What is compared with what: the gradient norm of an update, before clipping, with the median of the
last ones; and its loss with what its buckets usually lose, as a short clip of low resolution has
another loss than a long one. With medians `m_b` over the updates of the window in which bucket `b`
was seen, an update with `n_b` micro-batches of losses summing to `l_b` is a spike when

    sum_b l_b  >  factor * sum_b n_b * m_b

over the buckets that were seen in `MOST_RARE` updates or more; of others too little is known, and
only the norm speaks. Timesteps are drawn anew for each clip, so a factor well above 1 is needed
where few micro-batches make an update.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from kinema.config.errors import KinemaError
from kinema.training.config import GuardConfig

MOST_RARE = 5
"""Updates of the window that must have seen a bucket before its losses are compared."""

BucketLosses = Mapping[str, tuple[float, int]]
"""By bucket: sum of the losses of its micro-batches in an update, on all ranks, and how many."""


class GuardError(KinemaError):
    """The run went back as often as it may; raised on every rank alike."""


@dataclass(frozen=True)
class Spike:
    """Why an update is left out.

    Attributes:
        loss: mean over the micro-batches of the update.
        usual_loss: what it would be by the medians of its buckets; None: not known.
        norm: of the gradients before clipping.
        usual_norm: median of the window; None: nothing is in it.
    """

    loss: float
    usual_loss: float | None
    norm: float
    usual_norm: float | None

    def __str__(self) -> str:
        def against(value: float, usual: float | None) -> str:
            return f"{value:.4g}" + ("" if usual is None else f" (usually {usual:.4g})")

        return (
            f"loss {against(self.loss, self.usual_loss)}, "
            f"gradient norm {against(self.norm, self.usual_norm)}"
        )


@dataclass(frozen=True)
class Work:
    """A micro-batch of an update that was left out.

    Attributes:
        rows: rows of the manifest.
        paths: their files.
    """

    rank: int
    bucket: str
    loss: float
    rows: list[int]
    paths: list[str]


@dataclass
class Guard:
    """The guard of a run. The same on every rank: it sees only what is summed over ranks.

    Attributes:
        window: of the last updates made: `norm` and `losses`.
        skipped: rows of the micro-batches at fault, of each update left out since the last one
            that was made: (epoch, rows).
        quarantine: rows that are passed over, by epoch.
        rollbacks: times that the run went back.
    """

    config: GuardConfig
    window: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[int, list[int]]] = field(default_factory=list)
    quarantine: dict[int, set[int]] = field(default_factory=dict)
    rollbacks: int = 0

    def judge(self, losses: BucketLosses, norm: float) -> Spike | None:
        """Whether an update is a spike. What is not finite always is."""
        total, count = sum(s for s, _ in losses.values()), sum(n for _, n in losses.values())
        medians = self._medians()
        known = [label for label in losses if label in medians]
        usual = sum(losses[label][1] * medians[label] for label in known)
        usual_norm = median(u["norm"] for u in self.window) if self.window else None
        seen = sum(losses[label][1] for label in known)
        spike = Spike(
            loss=total / count if count else math.nan,
            usual_loss=usual / seen if seen else None,
            norm=norm,
            usual_norm=usual_norm,
        )
        if count and not (math.isfinite(total) and math.isfinite(norm)):
            return spike
        if len(self.window) < self.config.window or usual_norm is None:
            return None
        factor = self.config.factor
        high = bool(known) and sum(losses[label][0] for label in known) > factor * usual
        return spike if high or norm > factor * usual_norm else None

    def faulty(self, works: Sequence[Work]) -> list[Work]:
        """The micro-batches whose own loss is a spike; all of them where none stands out."""
        medians, factor = self._medians(), self.config.factor
        chosen = [
            work
            for work in works
            if not math.isfinite(work.loss)
            or (work.bucket in medians and work.loss > factor * medians[work.bucket])
        ]
        return chosen or list(works)

    def _medians(self) -> dict[str, float]:
        seen: dict[str, list[float]] = {}
        for update in self.window:
            for label, (total, count) in update["losses"].items():
                seen.setdefault(label, []).append(total / count)
        enough = min(MOST_RARE, self.config.window)
        return {label: median(v) for label, v in seen.items() if len(v) >= enough}

    def accept(self, losses: BucketLosses, norm: float) -> None:
        """An update was made."""
        seen = {label: [total, count] for label, (total, count) in losses.items() if count}
        self.window.append({"norm": norm, "losses": seen})
        del self.window[: -self.config.window]
        self.skipped.clear()

    def skip(self, epoch: int, faulty: Sequence[Work]) -> bool:
        """An update was left out; returns whether the run must go back."""
        self.skipped.append((epoch, sorted({row for work in faulty for row in work.rows})))
        return len(self.skipped) >= self.config.skips

    def go_back(self, where: str) -> None:
        """The run goes back: what was at fault is passed over from now on.

        Args:
            where: the run folder, for the error.

        Raises:
            GuardError: it went back as often as it may.
        """
        if self.rollbacks >= self.config.rollbacks:
            raise GuardError(
                f"{len(self.skipped)} updates in a row were spikes again, after going back "
                f"{self.rollbacks} times",
                where=where,
                hint="spikes.jsonl has losses, norms and clips; lower optim.lr, drop these clips, "
                "or raise guard.factor, then go on with --load",
            )
        self.rollbacks += 1
        for epoch, rows in self.skipped:
            self.quarantine.setdefault(epoch, set()).update(rows)
        self.skipped.clear()

    def passed_over(self, epoch: int) -> set[int]:
        """Rows that are left out of an epoch."""
        return self.quarantine.get(epoch, set())

    def state(self) -> dict[str, Any]:
        """JSON values, which stay as they are: a save writes them while training goes on."""
        return {
            "window": list(self.window),
            "skipped": [[epoch, rows] for epoch, rows in self.skipped],
            "quarantine": {str(e): sorted(rows) for e, rows in self.quarantine.items()},
            "rollbacks": self.rollbacks,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on where a checkpoint was written. What was learnt since then stays known.

        Args:
            state: None: it was written without a guard.
        """
        if state is None:
            return
        self.window = [dict(update) for update in state["window"]][-self.config.window :]
        self.skipped = [(int(epoch), list(rows)) for epoch, rows in state["skipped"]]
        for epoch, rows in state["quarantine"].items():
            self.quarantine.setdefault(int(epoch), set()).update(rows)
        self.rollbacks = max(self.rollbacks, int(state["rollbacks"]))


def write_spike(
    run: Path, spike: Spike, *, step: int, position: tuple[int, int], works: Sequence[Work]
) -> None:
    """One line of `spikes.jsonl`.

    Args:
        step: updates made before.
        position: epoch and step of the epoch.
        works: what every rank worked on.
    """
    line = {
        "step": step,
        "epoch": position[0],
        "epoch_step": position[1],
        **asdict(spike),
        "micro_batches": [asdict(work) for work in works],
    }
    with (run / "spikes.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(_json(line), ensure_ascii=False) + "\n")


def _json(value: Any) -> Any:
    """What is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, list) else value
