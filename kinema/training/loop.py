"""The loop: batches in, updates and checkpoints out. The same for every task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.data.loader import Batch
from kinema.models.transformer import Transformer
from kinema.parallel.engine import Engine
from kinema.parallel.sequence import SequenceGroups
from kinema.parallel.world import World
from kinema.telemetry.run_log import RunLog, say
from kinema.telemetry.spans import Spans
from kinema.training import nonfinite
from kinema.training.agree import agree_on_rows
from kinema.training.config import TrainRecipe
from kinema.training.draws import Draws
from kinema.training.feed import bucket_label
from kinema.training.guard import Spike, Work
from kinema.training.meters import Meters, add_micro_batch, step_keys, weight_norm
from kinema.training.profile import Profile
from kinema.training.saving import Saver
from kinema.training.schedule import learning_rate
from kinema.training.spikes import Spikes
from kinema.training.stand_in import stand_in_loss
from kinema.training.state import TrainState
from kinema.training.stop import StopRequest
from kinema.training.tasks import LossReport, Task
from kinema.training.validation import Validation
from kinema.training.vitals import Vitals
from kinema.training.window import Window

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SKIPPED_UPDATES = 30
"""fp16 halves its loss scale whenever gradients overflow and skips that update. From the first
scale, 65536, this many in a row come down to 6e-5: no loss is that large, so something is wrong."""


class Data(Protocol):
    """Where the loop gets its micro-batches and their names from."""

    @property
    def labels(self) -> list[str]:
        """Names of all buckets as the log has them, the same on every rank."""
        ...

    def epoch(self, number: int, start: int) -> tuple[int, Iterator[Batch]]:
        """Number of steps of an epoch, and this rank's micro-batches from step `start` on."""
        ...

    def first_videos(self) -> Iterable[Tensor]:
        """A few videos `[B, 3, T, H, W]` on the device, the same at each call."""
        ...

    def path(self, row: int) -> str:
        """The file of a row of the manifest."""
        ...


@dataclass(frozen=True)
class _Micro:
    """A micro-batch that went through: still on the device, to spare a wait for each."""

    batch: Batch
    report: LossReport

    @property
    def loss(self) -> Tensor:
        return self.report.loss


@dataclass(frozen=True)
class _Outcome:
    """What all ranks know of a step before they update."""

    clips: int
    """Clips that any rank trained on."""
    loss_finite: bool
    grad_finite: bool
    stop: bool
    spike: Spike | None
    """The guard leaves this update out."""


class Trainer:
    """One run on one rank.

    Args:
        groups: of ranks that share a micro-batch.
        vitals: told what this rank is at.
        run: the run folder, written by rank 0.
        log: None on the other ranks.
        meters: made when the run begins.
        about: goes into each checkpoint's state: recipe, data, code.
        components: goes into each checkpoint: see `training.components`.
        saved_step: the step whose checkpoint is in the run folder already.
        on_step: called on rank 0 after each step with (steps done, the logged record or None).
        on_preview: called every `recipe.preview.every` steps, on all ranks.
        validation: made on every rank.
        profile: made on every rank; the run ends when it is complete, and saves nothing for it.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        world: World,
        task: Task,
        state: TrainState,
        engine: Engine,
        groups: SequenceGroups,
        data: Data,
        vitals: Vitals,
        *,
        run: Path,
        log: RunLog | None,
        spans: Spans,
        meters: Meters,
        stop: StopRequest,
        about: dict[str, Any],
        components: dict[str, Any],
        saved_step: int | None = None,
        on_step: Callable[[int, dict[str, Any] | None], None] | None = None,
        on_preview: Callable[[TrainState], None] | None = None,
        validation: Validation | None = None,
        profile: Profile | None = None,
    ) -> None:
        self.recipe = recipe
        self.state = state
        self._world = world
        self._task = task
        self._data = data
        self._run = run
        self._log = log
        self._spans = spans
        self._meters = meters
        self._stop = stop
        self._on_step = on_step
        self._on_preview = on_preview
        self._validation = validation
        self._profile = profile
        self._engine = engine
        self._groups = groups
        self._vitals = vitals
        self._spikes = None
        if state.guard is not None:
            self._spikes = Spikes(state.guard, state, world, run, log)
        self._gradients = engine.gradients(state.trained)
        # A rank that cannot read its very first clips would have no loss scale to go by.
        state.scaler.scale(torch.zeros((), device=world.device))
        if engine.sharded:
            meters.waits.watch(state.model)
        shared = ("bad losses", "bad gradients", "norm", "stop", "failed saves")
        self._keys = [*step_keys(data.labels, task.parts), *shared]
        self._skipped = 0  # updates in a row that fp16 overflow has cost
        self._clips = 0  # trained on in this epoch, by all ranks, since this process began it
        self._saver = Saver(
            recipe,
            world,
            state,
            run=run,
            log=log,
            about=about,
            components=components,
            finalise=lambda: task.finalise(state.model, data.first_videos),
            saved_step=saved_step,
        )

    def try_out(self, batch: Batch) -> None:
        """Forward and backward of a micro-batch as in a step; leaves nothing behind. Collective."""
        self.state.model.train()
        self._gradients.zero()
        self._gradients.expect(last=True)
        with self._spans("warm up"):
            draws = Draws(self.recipe.seed, 0, int(batch.rows[0]), self._world.device)
            self._forward_backward(batch.to(self._world.device), draws)
            self._gradients.finish()
        self._gradients.zero()

    # The run

    def run(self) -> bool:
        """Train until the recipe's end or until asked to stop; a checkpoint is written either way.

        Returns:
            Whether the recipe's end was reached.

        Raises:
            NonFiniteError: see `train_step`.
            CheckpointError: a checkpoint could not be written.
            KinemaError: an epoch in which no clip could be read.
        """
        self.state.model.train()
        with self._saver, self._profile or nullcontext():
            return self._train()

    def _train(self) -> bool:
        state, stopped = self.state, False
        while not stopped and not self._finished():
            epoch, start = state.position
            num_steps, batches = self._data.epoch(epoch, start)
            self._clips = 0
            for index in range(start, num_steps):
                updated, stopped = self.train_step(batches, epoch)
                if self._profile is not None and self._profile.stepped():
                    return False
                if self._spikes is not None and self._spikes.go_back_now and not stopped:
                    break
                state.position = (epoch, index + 1) if index + 1 < num_steps else (epoch + 1, 0)
                state.epoch = epoch
                if updated:
                    self._after_update()
                if stopped or self._finished():
                    break
            else:
                state.position = (epoch + 1, 0)
            if self._spikes is not None and self._spikes.go_back_now and not stopped:
                self._go_back(epoch, index, num_steps)
                continue
            if start == 0 and state.position[0] > epoch and not self._clips:
                raise KinemaError(
                    f"none of the clips of epoch {epoch} could be read",
                    where=str(self._run),
                    hint="kinema data check MANIFEST says what is wrong with each",
                )
        self.save()
        with self._spans("save"):
            self._saver.settle()
        return not stopped

    def _go_back(self, epoch: int, index: int, num_steps: int) -> None:
        """Return to the newest checkpoint, or go on past a step of an epoch where there is none."""
        assert self._spikes is not None
        self._vitals.be_patient()
        with self._spans("save"):
            self._saver.settle()
            step = self._spikes.go_back(
                restore=lambda checkpoint: self.state.restore(checkpoint, data_position=True)
            )
        if step is None:
            last = index + 1 == num_steps
            self.state.position = (epoch + 1, 0) if last else (epoch, index + 1)
            return
        self._saver.went_back(step)

    def _finished(self) -> bool:
        limit = self.recipe.max_steps
        done = limit is not None and self.state.step >= limit
        return done or self.state.position[0] >= self.recipe.epochs

    def _after_update(self) -> None:
        recipe, step = self.recipe, self.state.step
        record = None
        self._saver.report()
        profiled = self._profile is not None  # steps and nothing else, and nothing of it is kept
        found = {} if profiled else self._validate()
        if step == 1 or step % recipe.log_every == 0:
            record = self._write_record(found)
        elif found and self._log is not None:
            self._log.step({"step": step, "epoch": self.state.epoch, **found})
        if step % recipe.ckpt_every == 0 and not profiled:
            self.save()
        if recipe.preview and step % recipe.preview.every == 0 and not profiled:
            self._vitals.be_patient()
            if self._on_preview:
                with self._spans("preview"):
                    self._on_preview(self.state)
        if self._world.is_main and self._on_step:
            self._on_step(step, record)

    # One step

    def train_step(self, batches: Iterator[Batch], epoch: int) -> tuple[bool, bool]:
        """One optimizer update from `accumulation` micro-batches of every rank.

        Each micro-batch weighs the same, whatever its size: the gradient is the mean over
        ranks and accumulation.

        Args:
            batches: this rank's micro-batches.
            epoch: of the data.

        Returns:
            Whether the weights were updated (an overflow of fp16 skips the update, and so does
            a step of which no clip could be read), and whether any rank was asked to stop.

        Raises:
            NonFiniteError: loss or gradients are not finite, before the update, on every rank.
        """
        start = time.perf_counter()
        lr = learning_rate(self.recipe.optim.schedule, self.recipe.optim.lr, self.state.step)
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr

        self._vitals.begin(self.state.step)
        self._gradients.zero()
        micros = []
        for i in range(self.recipe.accumulation):
            self._vitals.await_micro(i)
            with self._spans("data"):
                batch = next(batches)
                if self._spikes is not None:
                    batch = self._spikes.pass_over(batch, epoch)
                batch = batch.to(self._world.device)
            if batch.degree > 1:
                batch = self._agree_on_rows(batch)
            self._gradients.expect(last=i == self.recipe.accumulation - 1)
            self._report_unreadable(batch)
            self._vitals.hold(bucket_label(batch.bucket), batch)
            if not batch.empty:
                draws = Draws(self.recipe.seed, epoch, int(batch.rows[0]), self._world.device)
                micros.append(self._forward_backward(batch, draws))
            elif self._engine.sharded:
                self._take_part()
        with self._spans("reduce"), self._meters.waits.stream():
            own_norm = self._gradients.finish()

        with self._spans("optimizer"):
            if self.state.scaler.is_enabled():
                self.state.scaler.unscale_(self.state.optimizer)
            norm = self._gradients.norm()
            with self._spans("agree"):
                outcome = self._agree(micros, norm)
            if outcome.spike is not None and self._spikes is not None:
                self._spikes.leave_out(outcome.spike, self._works(micros))
                self.state.scaler.update()
                self._clips += outcome.clips
                self._vitals.end()
                return False, outcome.stop
            self._skipped = 0 if outcome.grad_finite else self._skipped + 1
            allowed = MAX_SKIPPED_UPDATES if self.state.scaler.is_enabled() else 0
            if not outcome.loss_finite or self._skipped > allowed:
                self._refuse(micros, float(own_norm))
            updated = self._update(norm, outcome)
        self._clips += outcome.clips
        self._vitals.end()
        if updated:
            self.state.useful_s += time.perf_counter() - start
            self._meters.add_update()
        return updated, outcome.stop

    def _agree_on_rows(self, batch: Batch) -> Batch:
        # A phase of its own: who waits in it is further than who still waits for data.
        with self._spans("share"), self._meters.waits.host(), self._groups.use(batch.degree):
            return agree_on_rows(batch, self._groups)

    def _forward_backward(self, batch: Batch, draws: Draws) -> _Micro:
        with self._engine.forward(), self._groups.use(batch.degree):
            report = self._task.loss(self.state.model, batch, draws)
        with self._spans("backward"):
            loss = report.loss * (batch.weight / self.recipe.accumulation)
            self.state.scaler.scale(loss).backward()
        return _Micro(batch, replace(report, loss=report.loss.detach()))

    def _take_part(self) -> None:
        """With nothing to compute: the other ranks wait for this one's part of every block."""
        model = self.state.model
        assert isinstance(model, Transformer)
        with self._spans("forward"), self._engine.forward():
            loss = stand_in_loss(model, self._world.device)
        with self._spans("backward"):
            self.state.scaler.scale(loss).backward()

    def _agree(self, micros: list[_Micro], norm: Tensor) -> _Outcome:
        """Sum what each rank saw over all ranks: one decision, and the window of the log."""
        # The one wait for the device in a step.
        losses = [float(m.loss) for m in micros]
        seen = dict.fromkeys(self._keys, 0.0)
        for micro, loss in zip(micros, losses, strict=True):
            if not micro.batch.weight:  # stands a second time, to fill up the step
                continue
            if self._world.rank % micro.batch.degree:  # another rank's as well, and counted there
                continue
            add_micro_batch(seen, micro.batch, micro.report, loss, self._meters.work)
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
            self._saver.settle()  # raises, on every rank

        grad_finite = not total["bad gradients"]
        self._meters.add_step(total)
        spike = self._judge(total)
        if spike is None:
            self.state.window.add(total, grad_norm=float(norm) if grad_finite else None)
        return _Outcome(
            clips=int(total["samples"]),
            loss_finite=not total["bad losses"],
            grad_finite=grad_finite,
            stop=bool(total["stop"]),
            spike=spike,
        )

    def _judge(self, total: dict[str, float]) -> Spike | None:
        """Whether the guard leaves this update out, by what is summed over ranks."""
        guard = self.state.guard
        if guard is None or not total["samples"]:
            return None
        # An overflow of fp16 is no spike: it makes the loss scale smaller.
        if total["bad gradients"] and not total["bad losses"] and self.state.scaler.is_enabled():
            return None
        losses = {
            label: (total[f"loss/{label}"], int(total[f"count/{label}"]))
            for label in self._data.labels
            if total[f"count/{label}"]
        }
        spike = guard.judge(losses, total["norm"])
        if spike is None:
            guard.accept(losses, total["norm"])
        return spike

    def _works(self, micros: list[_Micro]) -> list[Work]:
        """This rank's part of a step."""
        return [
            Work(
                rank=self._world.rank,
                bucket=bucket_label(micro.batch.bucket),
                loss=float(micro.loss),
                rows=[int(row) for row in micro.batch.rows],
                paths=[self._data.path(int(row)) for row in micro.batch.rows],
            )
            for micro in micros
        ]

    def _update(self, norm: Tensor, outcome: _Outcome) -> bool:
        state, limit = self.state, self.recipe.optim.grad_clip
        # A step of which no file could be read: momentum alone must not move the weights.
        if not outcome.clips or not outcome.grad_finite:
            state.scaler.update()
            return False
        self._saver.before_update()
        if limit is not None:
            self._gradients.scale((limit / (norm + 1e-6)).clamp(max=1.0))
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema is not None:
            state.ema.update(state.model)
        state.step += 1
        return True

    def _refuse(self, micros: list[_Micro], own_norm: float) -> NoReturn:
        """Stop every rank alike, naming the ranks and clips at fault."""
        bad = [m for m in micros if not math.isfinite(float(m.loss))]
        faulty = bad or (micros if not math.isfinite(own_norm) else [])
        found = self._world.gather(self._offender(faulty, own_norm) if faulty else None)
        offenders = [one for one in found if one is not None]
        if not offenders:  # finite on every rank, and too large for float32 once summed
            offenders = self._world.gather(self._offender(micros, own_norm))
        step = self.state.step
        report = self._run / f"nonfinite-step{step}.json"
        if self._world.is_main:
            nonfinite.write_report(report, step, offenders)
        raise nonfinite.error(step, offenders, where=str(self._run), report=report)

    def _offender(self, micros: list[_Micro], own_norm: float) -> nonfinite.Offender:
        rows = [int(row) for m in micros for row in m.batch.rows]
        return nonfinite.Offender(
            rank=self._world.rank,
            loss=float(micros[0].loss) if micros else math.nan,
            gradient_norm=own_norm,
            bucket=str(micros[0].batch.bucket) if micros else "",
            rows=rows,
            paths=[self._data.path(row) for row in rows],
        )

    # What is written

    def _report_unreadable(self, batch: Batch) -> None:
        if self._world.rank % batch.degree:  # the first of those that share it says so
            return
        for bad in batch.skipped:
            text = f"left out {bad.path}: {bad.message}"
            if self._log is not None:
                self._log.event(text, row=bad.row)
            else:
                say(f"rank {self._world.rank}: {text}")

    def _validate(self) -> dict[str, float]:
        """What the record of this step says of held-out clips, if it is their turn."""
        if self._validation is None:
            return {}
        if self.state.step % self._validation.every and not self._finished():
            return {}
        self._vitals.be_patient()
        self._saver.before_update()  # it may be copying what changes places for a while
        with self._spans("validation"), self._meters.waits.ignored():
            return self._validation.run(self.state)

    def _write_record(self, found: dict[str, float]) -> dict[str, Any]:
        state, phases = self.state, self._spans.take()
        lr = learning_rate(self.recipe.optim.schedule, self.recipe.optim.lr, state.step - 1)
        record = {"step": state.step, "epoch": state.epoch, **state.window.record()}
        record |= {"weight_norm": weight_norm(state.trained.values()), "lr": lr}
        record |= self._meters.take(phases, state.useful_s)
        if state.scaler.is_enabled():
            record["loss_scale"] = state.scaler.get_scale()
        record |= {f"seconds/{name}": spent for name, spent in phases.items()}
        record |= found
        compared, events = self._vitals.compare()
        record |= compared
        state.window = Window()
        if self._log is not None:
            self._log.step(record)
            for text, fields in events:
                self._log.event(text, **fields)
        return record

    def save(self) -> None:
        """Begin to write a checkpoint of this step, unless there is one.

        Raises:
            CheckpointError: it could not be written, or the one before; on every rank.
        """
        self._vitals.be_patient()
        with self._spans("save"):
            self._saver.save()
