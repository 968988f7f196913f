"""What all ranks know of a step before they update: one decision, the same on each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from kinema.data.loader import Batch
from kinema.parallel.world import World
from kinema.telemetry.spans import Spans
from kinema.training import nonfinite
from kinema.training.feed import bucket_label
from kinema.training.guard import Spike, Work
from kinema.training.meters import Meters, add_micro_batch, step_keys
from kinema.training.saving import Saver
from kinema.training.state import TrainState
from kinema.training.stop import StopRequest
from kinema.training.tasks import LossReport
from kinema.training.vitals import Vitals


@dataclass(frozen=True)
class Micro:
    """A micro-batch that went through: still on the device, to spare a wait for each."""

    batch: Batch
    report: LossReport

    @property
    def loss(self) -> Tensor:
        return self.report.loss


@dataclass(frozen=True)
class Outcome:
    """What `Agreement` finds."""

    clips: int
    """Clips that any rank trained on."""
    loss_finite: bool
    grad_finite: bool
    stop: bool
    spike: Spike | None
    """The guard leaves this update out."""


class Agreement:
    """Sums what each rank saw of a step over all ranks; see `Trainer` for the arguments.

    Args:
        labels: of all buckets, the same on every rank.
        parts: of the task's loss.
        path: the file of a row of the manifest.
    """

    def __init__(
        self,
        world: World,
        state: TrainState,
        *,
        labels: Sequence[str],
        parts: Sequence[str],
        path: Callable[[int], str],
        run: Path,
        stop: StopRequest,
        spans: Spans,
        meters: Meters,
        vitals: Vitals,
        saver: Saver,
    ) -> None:
        self._world = world
        self._state = state
        self._labels = labels
        self._path = path
        self._run = run
        self._stop = stop
        self._spans = spans
        self._meters = meters
        self._vitals = vitals
        self._saver = saver
        shared = ("bad losses", "bad gradients", "norm", "stop", "failed saves")
        self._keys = [*step_keys(labels, parts), *shared]

    def reach(self, micros: Sequence[Micro], norm: Tensor, *, unreadable: int) -> Outcome:
        """Decide, and add the step to the window of the log. Collective.

        Args:
            micros: what this rank computed.
            norm: of the averaged gradients.
            unreadable: clips of this rank's micro-batches that could not be read.

        Raises:
            CheckpointError: the save in flight came to nothing; on every rank.
        """
        # The one wait for the device in a step.
        losses = [float(m.loss) for m in micros]
        seen = dict.fromkeys(self._keys, 0.0)
        for micro, loss in zip(micros, losses, strict=True):
            if not micro.batch.weight:  # stands a second time, to fill up the step
                continue
            if self._world.rank % micro.batch.degree:  # another rank's as well, and counted there
                continue
            add_micro_batch(seen, micro.batch, micro.report, loss, self._meters.work)
        seen["unreadable"] = float(unreadable)
        seen["bad losses"] = float(sum(not math.isfinite(loss) for loss in losses))
        seen["bad gradients"] = float(not math.isfinite(float(norm)))
        seen["stop"] = float(bool(self._stop))
        # Of one rank: the same number on all, to the last bit.
        seen["norm"] = float(norm) if self._world.is_main else 0.0
        seen["failed saves"] = float(self._saver.failed)
        with self._meters.waits.host():
            summed = self._world.sum(torch.tensor(list(seen.values()), dtype=torch.float64))
        total = dict(zip(seen, summed.tolist(), strict=True))
        if total["failed saves"]:
            self._vitals.be_patient()  # others may still be writing
            with self._spans("save"):
                self._saver.settle()  # raises, on every rank

        grad_finite = not total["bad gradients"]
        self._meters.add_step(total)
        spike = self._judge(total)
        if spike is None:
            updates = grad_finite and total["samples"] > 0
            self._state.window.add(total, grad_norm=float(norm) if updates else None)
        return Outcome(
            clips=int(total["samples"]),
            loss_finite=not total["bad losses"],
            grad_finite=grad_finite,
            stop=bool(total["stop"]),
            spike=spike,
        )

    def _judge(self, total: dict[str, float]) -> Spike | None:
        """Whether the guard leaves this update out, by what is summed over ranks."""
        guard = self._state.guard
        if guard is None or not total["samples"]:
            return None
        # An overflow of fp16 is no spike: it makes the loss scale smaller.
        overflows = self._state.scaler.is_enabled()
        if total["bad gradients"] and not total["bad losses"] and overflows:
            return None
        losses = {
            label: (total[f"loss/{label}"], int(total[f"count/{label}"]))
            for label in self._labels
            if total[f"count/{label}"]
        }
        spike = guard.judge(losses, total["norm"])
        if spike is None:
            guard.accept(losses, total["norm"])
        return spike

    def works(self, micros: Sequence[Micro]) -> list[Work]:
        """This rank's part of a step, for the guard."""
        return [
            Work(
                rank=self._world.rank,
                bucket=bucket_label(micro.batch.bucket),
                loss=float(micro.loss),
                rows=[int(row) for row in micro.batch.rows],
                paths=[self._path(int(row)) for row in micro.batch.rows],
            )
            for micro in micros
        ]

    def refuse(self, micros: Sequence[Micro], own_norm: float) -> NoReturn:
        """Stop every rank alike, naming the ranks and clips at fault. Collective.

        Args:
            own_norm: of this rank's gradients before averaging.

        Raises:
            NonFiniteError: always.
        """
        bad = [m for m in micros if not math.isfinite(float(m.loss))]
        faulty = bad or (micros if not math.isfinite(own_norm) else [])
        found = self._world.gather(self._offender(faulty, own_norm) if faulty else None)
        offenders = [one for one in found if one is not None]
        if not offenders:  # finite on every rank, and too large for float32 once summed
            offenders = self._world.gather(self._offender(micros, own_norm))
        step = self._state.step
        report = self._run / f"nonfinite-step{step}.json"
        if self._world.is_main:
            nonfinite.write_report(report, step, offenders)
        raise nonfinite.error(step, offenders, where=str(self._run), report=report)

    def _offender(self, micros: Sequence[Micro], own_norm: float) -> nonfinite.Offender:
        rows = [int(row) for m in micros for row in m.batch.rows]
        return nonfinite.Offender(
            rank=self._world.rank,
            loss=float(micros[0].loss) if micros else math.nan,
            gradient_norm=own_norm,
            bucket=str(micros[0].batch.bucket) if micros else "",
            rows=rows,
            paths=[self._path(row) for row in rows],
        )
