"""Checkpoints of a run: put aside while the step waits, written while it goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinema.checkpoint.disk import free_bytes, gigabytes
from kinema.checkpoint.errors import CheckpointError
from kinema.checkpoint.optimizer import OptimizerShare
from kinema.checkpoint.parts import AbandonedError, Content, SavePlan, complete, write_part
from kinema.checkpoint.run import begin, plan_save, prune
from kinema.config.errors import KinemaError
from kinema.config.recipe import dump_recipe
from kinema.data.plan import counted
from kinema.parallel.gather import whole
from kinema.parallel.world import World
from kinema.telemetry.run_log import RunLog
from kinema.training.config import TrainRecipe
from kinema.training.host_copies import HostCopies
from kinema.training.state import TrainState

LEAVING_WITHIN_S = 20.0
"""How long rank 0, when a run ends with an error, waits for the parts of the other ranks after its
own: they end with the same error and write theirs at the same time, or they are dead."""


class Saver:
    """Writes the checkpoints of a run, one at a time; on every rank.

    A save has three parts. While the step waits, each rank copies what it will write: whole tensors
    of the model and its average that it owns, and its own piece of the optimizer's state. A thread
    of each rank writes, flushes and hashes those. Rank 0's thread, once every rank's part is on the
    disk, writes `state.json` and renames the folder. No thread talks to another rank's: what goes
    wrong is known to all at the loop's next agreement (`failed`, then `settle`).

    With `async_save: false` the step waits for all of it, and nothing is copied that need not be.

    Args:
        log: None on other ranks than 0.
        about: goes into each checkpoint's state: recipe, data, code.
        components: goes into each checkpoint: see `training.components`.
        finalise: fills in what is measured rather than trained, before the model is saved.
        saved_step: the step whose checkpoint is in the run folder already.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        world: World,
        state: TrainState,
        *,
        run: Path,
        log: RunLog | None,
        about: Mapping[str, Any],
        components: Mapping[str, Any],
        finalise: Callable[[], None],
        saved_step: int | None = None,
    ) -> None:
        self._recipe = recipe
        self._world = world
        self._state = state
        self._run = run
        self._log = log
        self._about = about
        self._components = components
        self._recipe_text = dump_recipe(recipe)
        self._finalise = finalise
        self._saved_step = saved_step
        self._share = OptimizerShare(state.optimizer_tensors(), world.rank, world.size)
        self._copies = HostCopies(world.device) if recipe.async_save else None
        self._job: _Job | None = None

    def __enter__(self) -> Self:
        """Before the first step: ask for the memory that saves need, and warn of a full disk."""
        weights = self._weights()
        plan = self._plan(weights)
        if self._copies is not None:
            mine = _owned(plan, self._world.rank)
            self._copies.reserve(
                {
                    f"{section}/{name}": (tensor.shape, tensor.dtype)
                    for section, tensors in weights.items()
                    for name, tensor in tensors.items()
                    if (section, name) in mine
                }
                | {f"optimizer/{n}": (t.shape, t.dtype) for n, t in self._share.tensors.items()}
            )
        if self._log is not None and (note := _too_little_space(plan)):
            self._log.event(note)
        return self

    def save(self) -> None:
        """Begin to write a checkpoint of this step, unless there is one. Collective.

        Waits for the save before.

        Raises:
            CheckpointError: that or this one could not be written; on every rank.
        """
        if self._saved_step == self._state.step:
            return
        start = time.perf_counter()
        self.settle()
        self._finalise()
        weights = self._weights()
        plan = self._plan(weights)
        self._make_folder(plan)
        job = _Job(
            plan,
            self._world,
            weights=self._put_aside(plan, weights),
            share=self._share,
            values=self._put_aside_moments(),
            content=self._content(),
            copies=self._copies,
            keep=self._recipe.keep_checkpoints,
        )
        self._saved_step = self._state.step
        self._job = job
        job.blocked_s = time.perf_counter() - start
        job.start()
        if self._copies is None:
            self.settle()

    def went_back(self, step: int) -> None:
        """The run stands again where it was at this step, whose checkpoint is whole."""
        self._saved_step = step

    def before_update(self) -> None:
        """Call before weights, average or moments change: copies of them may be on their way."""
        if self._copies is not None:
            self._copies.hold_changes()

    @property
    def failed(self) -> bool:
        """Whether this rank's part of the save in flight came to nothing. Tell the others, and
        then call `settle` on all."""
        return self._job is not None and self._job.problem is not None

    def report(self) -> None:
        """Log a save that has ended since."""
        if self._job is not None:
            self._report(self._job)

    def _report(self, job: _Job) -> None:
        if self._log is not None and job.ended and not job.reported:
            job.reported = True
            if job.whole:
                beside = self._copies is not None
                seconds = {"blocked_s": job.blocked_s + (0.0 if beside else job.written_s)}
                seconds["written_s"] = job.written_s
                self._log.event(
                    "saved",
                    step=job.plan.step,
                    path=job.plan.final.name,
                    **{name: round(value, 3) for name, value in seconds.items()},
                )
            for note in job.notes:
                self._log.event(note)

    def settle(self) -> None:
        """Wait until the save in flight is a checkpoint. Collective.

        Raises:
            CheckpointError: it could not be written; on every rank. Nothing is left of it, and
                what was there before is as it was.
        """
        job = self._job
        if job is None:
            return
        job.wait_for_part()
        problems = [p for p in self._world.gather(job.problem) if p is not None]
        if not problems:
            if self._world.is_main:
                job.join()
            last = self._world.broadcast(job.problem)
            problems = [] if last is None else [last]
        if problems:
            job.abandon()
            if self._world.is_main:
                shutil.rmtree(job.plan.folder, ignore_errors=True)
            self._job = None
            raise _together(problems)
        self.report()
        self._job = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """After an error, let the save in flight become a checkpoint; who interrupts twice waits
        for nothing."""
        job, self._job = self._job, None
        if job is not None and (error is None or isinstance(error, Exception)):
            job.wait_for_part()
            job.join(LEAVING_WITHIN_S)
            job.abandon()
            self._report(job)

    def _weights(self) -> dict[str, Mapping[str, Tensor]]:
        weights: dict[str, Mapping[str, Tensor]] = {"model": self._state.model.state_dict()}
        average = self._state.average()
        return weights if average is None else weights | {"ema": average}

    def _plan(self, weights: Mapping[str, Mapping[str, Tensor]]) -> SavePlan:
        return plan_save(
            self._run,
            self._state.epoch,
            self._state.step,
            weights,
            self._state.optimizer_tensors(),
            ranks=self._world.size,
        )

    def _make_folder(self, plan: SavePlan) -> None:
        problem: KinemaError | OSError | None = None
        if self._world.is_main:
            try:
                begin(plan)
            except (KinemaError, OSError) as error:
                problem = error
        problem = self._world.broadcast(problem)
        if problem is not None:
            raise problem

    def _put_aside(
        self, plan: SavePlan, weights: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """The whole tensors that this rank writes, by section."""
        owners = {(f.section, name): f.rank for f in plan.files for name in f.sizes}
        result = {}
        for section, tensors in weights.items():

            def keep(
                name: str, value: Tensor, section: str = section, live: Any = tensors
            ) -> Tensor:
                if self._copies is not None:
                    return self._copies.take(f"{section}/{name}", value)
                # The step waits: what is whole is written from where it is.
                return value.cpu() if isinstance(live[name], DTensor) else value

            def owner(name: str, section: str = section) -> int:
                return owners[section, name]

            result[section] = whole(tensors, self._world, owner, keep=keep)
        return result

    def _put_aside_moments(self) -> Mapping[str, Tensor]:
        tensors, copies = self._share.tensors, self._copies
        if copies is None:
            return tensors
        aside = {name: copies.take(f"optimizer/{name}", t) for name, t in tensors.items()}
        copies.taken()
        return aside

    def _content(self) -> Content:
        state = {**self._state.values(), **self._about}
        return Content(state, self._components, self._recipe_text)


@dataclass
class _Job:
    """One save, from when its tensors are put aside."""

    plan: SavePlan
    world: World
    weights: Mapping[str, Mapping[str, Tensor]]
    share: OptimizerShare
    values: Mapping[str, Tensor]
    content: Content
    copies: HostCopies | None
    keep: int | None
    blocked_s: float = 0.0
    written_s: float = 0.0
    problem: CheckpointError | None = None
    whole: bool = False
    """It is a checkpoint; known to rank 0."""
    reported: bool = False

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        """For the log, in order."""
        self._part_written = threading.Event()
        self._abandoned = threading.Event()
        # Not waited for at exit: who leaves in a hurry leaves.
        self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def wait_for_part(self) -> None:
        """Until this rank's part is written, or came to nothing."""
        self._part_written.wait()

    def join(self, limit_s: float | None = None) -> None:
        self._thread.join(limit_s)

    def abandon(self) -> None:
        """Wait for no other rank any more."""
        self._abandoned.set()
        self._thread.join()

    def _work(self) -> None:
        start = time.perf_counter()
        try:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)  # of this thread
            if self.copies is not None:
                self.copies.wait()
            write_part(self.plan, self.world.rank, self.weights, self.share, self.values)
            self._part_written.set()
            if self.world.is_main:
                complete(self.plan, self.content, abandoned=self._abandoned.is_set)
                self.whole = True
                self._tidy_up()
        except AbandonedError:
            pass
        except BaseException as error:
            self.problem = _as_checkpoint_error(error, self.plan, self.world.rank)
        finally:
            self.written_s = time.perf_counter() - start
            self._part_written.set()

    def _tidy_up(self) -> None:
        try:
            if self.keep is not None:
                prune(self.plan.run, self.keep)
        except OSError as error:
            self.notes.append(f"an old checkpoint could not be deleted: {error}")
        if note := _too_little_space(self.plan):
            self.notes.append(note)


def _owned(plan: SavePlan, rank: int) -> set[tuple[str, str]]:
    return {(f.section, name) for f in plan.files if f.rank == rank for name in f.sizes}


def _too_little_space(plan: SavePlan) -> str | None:
    free = free_bytes(plan.run)
    if free >= plan.needs:
        return None
    return (
        f"warning: the next checkpoint needs {gigabytes(plan.needs)}, {gigabytes(free)} are free "
        f"where {plan.run} is; free space there, or the run will end when it saves"
    )


def _as_checkpoint_error(error: BaseException, plan: SavePlan, rank: int) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    said = CheckpointError(
        f"rank {rank}: could not be written: {type(error).__name__}: {error}",
        where=str(plan.final),
    )
    said.__cause__ = error
    return said


def _together(problems: list[CheckpointError]) -> CheckpointError:
    first = problems[0]
    if len(problems) == 1:
        return first
    more = f"; {counted(len(problems) - 1, 'other rank')} failed too"
    return CheckpointError(first.what + more, where=first.where, hint=first.hint)
