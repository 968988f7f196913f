"""`kinema train --profile`: a trace of a few steps, where their time goes, and what to try next."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from kinema.config.errors import KinemaError
from kinema.parallel.world import World
from kinema.telemetry.advice import Facts, render
from kinema.telemetry.run_log import RunLog, say
from kinema.telemetry.spans import Spans
from kinema.telemetry.trace import SPAN, break_down, read_trace
from kinema.training.config import TextToVideoTask, TrainRecipe

SKIPPED = 3
"""Steps before the profiler starts: kernels are chosen, memory is taken, decoding gets ahead."""
WARMED = 1
"""Steps in which it runs and nothing is kept: its own beginning is slow."""


def check_length(recipe: TrainRecipe, steps: int) -> None:
    """Whether a run is long enough for its profile.

    Args:
        steps: to record.

    Raises:
        KinemaError: the recipe ends before.
    """
    needed = SKIPPED + WARMED + steps
    if recipe.max_steps is not None and recipe.max_steps < needed:
        raise KinemaError(
            f"--profile takes {needed} steps (--profile-steps is {steps}), "
            f"and the run ends after {recipe.max_steps}",
            where="max_steps",
            hint=f"--max_steps {needed}, and enough --epochs",
        )


class Profile:
    """Records some steps of a run on rank 0; the run ends when they are over.

    Use it as a context manager around the run. The phases of `spans` are marks in the trace.

    Args:
        steps: to record.
        spans: of the run; whoever else is told of phases still is.
        run: the run folder; the trace and the table go to its `profile/`.
        log: None on the other ranks.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        world: World,
        steps: int,
        *,
        spans: Spans,
        run: Path,
        log: RunLog | None,
    ) -> None:
        self.needed = SKIPPED + WARMED + steps
        self._done = 0
        self._facts = facts_of(recipe, world)
        self._world = world
        self._spans = spans
        self._folder = run / "profile"
        self._log = log
        self._mark: Any = None
        self._others: Callable[[str], None] | None = None
        self._profiler: Any = None
        if log is not None:
            activities = [ProfilerActivity.CPU]
            if world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(
                activities=activities,
                schedule=schedule(wait=SKIPPED, warmup=WARMED, active=steps, repeat=1),
                on_trace_ready=self._finish,
            )

    def __enter__(self) -> Self:
        """The first step is about to begin."""
        if self._profiler is not None:
            self._others, self._spans.on_enter = self._spans.on_enter, self._enter
            self._profiler.start()
        return self

    def stepped(self) -> bool:
        """A step is over, of all ranks; whether it was the last one to be recorded."""
        self._done += 1
        if self._profiler is not None:
            self._leave()  # marks stay within their step
            self._profiler.step()
        return self._done >= self.needed

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The run is over.

        Raises:
            KinemaError: before all steps were recorded.
        """
        if self._profiler is not None:
            self._leave()
            self._spans.on_enter = self._others
            self._profiler.stop()
        if error is None and self._done < self.needed:
            raise KinemaError(
                f"the run ended after {self._done} steps, before its profile was complete",
                where=str(self._folder.parent),
                hint=f"it takes {self.needed} steps: fewer --profile-steps, or more --max_steps",
            )

    def _enter(self, phase: str) -> None:
        if self._others is not None:
            self._others(phase)
        self._leave()
        if phase:
            self._mark = record_function(f"{SPAN}{phase}")
            self._mark.__enter__()

    def _leave(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _finish(self, profiler: Any) -> None:
        """Write the trace, and say what is in it; of a run that ended before, nothing."""
        assert self._log is not None
        if self._done < self.needed:
            return
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / "trace-rank0.json.gz"
        temporary = trace.with_name(f".{os.getpid()}.{trace.name}")
        profiler.export_chrome_trace(str(temporary))
        table = render(break_down(read_trace(temporary)), self._facts)
        temporary.replace(trace)
        text = self._folder / "table.txt"
        temporary = text.with_name(f".{os.getpid()}.{text.name}")
        temporary.write_text(table + "\n", encoding="utf-8")
        temporary.replace(text)
        say(table)
        self._log.event("profiled", trace=trace, open_with="https://ui.perfetto.dev")


def facts_of(recipe: TrainRecipe, world: World) -> Facts:
    """What a recipe has set of what could be advised."""
    task = recipe.task
    remembers = isinstance(task, TextToVideoTask) and task.remember_latents
    return Facts(
        ranks=world.size,
        shard=recipe.parallel.shard,
        hybrid=recipe.parallel.shard_over != "all",
        compile=recipe.compile,
        recompute=recipe.recompute,
        latents_cached=remembers or recipe.latent_cache is not None,
        workers=recipe.data.num_workers,
    )
