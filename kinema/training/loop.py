"""The loop: batches in, updates and checkpoints out. The same for every task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from kinema.training.agree import agree_on_rows
from kinema.training.config import TrainRecipe
from kinema.training.draws import Draws
from kinema.training.feed import Data, bucket_label
from kinema.training.meters import Meters, weight_norm
from kinema.training.outcome import Agreement, Micro, Outcome
from kinema.training.profile import Profile
from kinema.training.saving import Saver
from kinema.training.schedule import learning_rate
from kinema.training.spikes import Spikes
from kinema.training.stand_in import stand_in_loss
from kinema.training.state import TrainState
from kinema.training.stop import StopRequest
from kinema.training.tasks import Task
from kinema.training.validation import Validation
from kinema.training.vitals import Vitals
from kinema.training.window import Window

MAX_SKIPPED_UPDATES = 30
"""fp16 halves its loss scale whenever gradients overflow and skips that update. From the first
scale, 65536, this many in a row come down to 6e-5: no loss is that large, so something is wrong."""


class Trainer:
    """One run on one rank.

    Args:
        groups: of ranks that share a micro-batch.
        vitals: told what this rank is at.
        run: the run folder, written by rank 0.
        log: None on the other ranks.
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
        self._on_step = on_step
        self._on_preview = on_preview
        self._validation = validation
        self._profile = profile
        self._engine = engine
        self._groups = groups
        self._vitals = vitals
        guard = state.guard
        self._spikes = None if guard is None else Spikes(guard, state, world, run, log)
        self._gradients = engine.gradients(state.trained)
        # A rank that cannot read its very first clips would have no loss scale to go by.
        state.scaler.scale(torch.zeros((), device=world.device))
        if engine.sharded:
            meters.waits.watch(state.model)
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
        self._agreement = Agreement(
            world,
            state,
            labels=data.labels,
            parts=task.parts,
            path=data.path,
            run=run,
            stop=stop,
            spans=spans,
            meters=meters,
            vitals=vitals,
            saver=self._saver,
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
            self._vitals.be_patient()  # laying out an epoch of many millions takes a minute
            with self._spans("order"):
                num_steps, batches = self._data.epoch(epoch, start)
            self._clips = 0
            for index in range(start, num_steps):
                after = (epoch, index + 1) if index + 1 < num_steps else (epoch + 1, 0)
                updated, stopped = self.train_step(batches, epoch)
                if self._profile is not None and self._profile.stepped():
                    return False
                if self._spikes is not None and self._spikes.go_back_now and not stopped:
                    break
                state.position = after
                state.epoch = epoch
                if updated:
                    self._after_update()
                if stopped or self._finished():
                    break
            else:
                state.position = (epoch + 1, 0)
            if self._spikes is not None and self._spikes.go_back_now and not stopped:
                self._go_back(after)
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

    def _go_back(self, after: tuple[int, int]) -> None:
        """Return to the newest checkpoint, or go on at `after` where there is none."""
        assert self._spikes is not None
        self._vitals.be_patient()
        with self._spans("save"):
            self._saver.settle()
            step = self._spikes.go_back(
                restore=lambda checkpoint: self.state.restore(checkpoint, data_position=True)
            )
        if step is None:
            self.state.position = after
        else:
            self._saver.went_back(step)

    def _finished(self) -> bool:
        recipe, state = self.recipe, self.state
        done = recipe.max_steps is not None and state.step >= recipe.max_steps
        return done or state.position[0] >= recipe.epochs

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
        due = recipe.preview and step % recipe.preview.every == 0 and not profiled
        if due and self._on_preview:
            self._vitals.be_patient()
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
        micros: list[Micro] = []
        unreadable = 0
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
            if not self._world.rank % batch.degree:  # the first of those that share it says so
                unreadable += self._report_unreadable(batch)
            self._vitals.hold(bucket_label(batch.bucket), batch)
            if not batch.empty:
                draws = Draws(self.recipe.seed, epoch, int(batch.rows[0]), self._world.device)
                micros.append(self._forward_backward(batch, draws))
            elif self._engine.sharded:
                self._take_part()
            del batch  # the optimizer can have the memory of its pixels
        with self._spans("reduce"), self._meters.waits.stream():
            own_norm = self._gradients.finish()

        with self._spans("optimizer"):
            if self.state.scaler.is_enabled():
                self.state.scaler.unscale_(self.state.optimizer)
            norm = self._gradients.norm()
            with self._spans("agree"):
                outcome = self._agreement.reach(micros, norm, unreadable=unreadable)
            if outcome.spike is not None and self._spikes is not None:
                self._spikes.leave_out(outcome.spike, self._agreement.works(micros))
                self.state.scaler.update()
                updated = False
            else:
                self._skipped = 0 if outcome.grad_finite else self._skipped + 1
                allowed = MAX_SKIPPED_UPDATES if self.state.scaler.is_enabled() else 0
                if not outcome.loss_finite or self._skipped > allowed:
                    self._agreement.refuse(micros, float(own_norm))
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

    def _forward_backward(self, batch: Batch, draws: Draws) -> Micro:
        with self._engine.forward(), self._groups.use(batch.degree):
            report = self._task.loss(self.state.model, batch, draws)
        with self._spans("backward"):
            loss = report.loss * (batch.weight / self.recipe.accumulation)
            self.state.scaler.scale(loss).backward()
        return Micro(batch.without_pixels(), replace(report, loss=report.loss.detach()))

    def _take_part(self) -> None:
        """With nothing to compute: the other ranks wait for this one's part of every block."""
        model = self.state.model
        assert isinstance(model, Transformer)
        with self._spans("forward"), self._engine.forward():
            loss = stand_in_loss(model, self._world.device)
        with self._spans("backward"):
            self.state.scaler.scale(loss).backward()

    def _update(self, norm: Tensor, outcome: Outcome) -> bool:
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

    # What is written

    def _report_unreadable(self, batch: Batch) -> int:
        """Name what a micro-batch lacks; returns how much of it counts."""
        for bad in batch.skipped:
            text = f"left out {bad.path}: {bad.message}"
            if self._log is not None:
                self._log.event(text, row=bad.row)
            else:
                say(f"rank {self._world.rank}: {text}")
        return len(batch.skipped) if batch.weight else 0

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
        record = {"step": state.step, "epoch": state.epoch, **state.window.record()}
        record["weight_norm"] = weight_norm(state.trained.values())
        record["lr"] = state.optimizer.param_groups[0]["lr"]
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
