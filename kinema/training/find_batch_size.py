"""The largest micro-batch of every bucket that fits the device at hand, found by trying.

What a step adds (activations and all that comes and goes) is measured in real forward and backward
passes; what is always there (weights, gradients, moments, average, frozen networks) has sizes that
are known, and is counted for as many ranks as the run will have. On a CPU, whose memory others
share, both are predicted and the result is only run to be timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from kinema.config.errors import ConfigError, KinemaError
from kinema.data.manifest import Manifest
from kinema.parallel.config import ParallelConfig
from kinema.parallel.engine import Engine
from kinema.parallel.sequence import SequenceGroups
from kinema.parallel.world import World, open_world
from kinema.telemetry.progress import Progress
from kinema.telemetry.spans import Spans
from kinema.training.config import TextToVideoTask, TrainRecipe
from kinema.training.draws import Draws
from kinema.training.estimate import order_of
from kinema.training.fit import LengthFit, equal_batches, fit, with_batches
from kinema.training.memory import MemoryPlan, predict
from kinema.training.parts import blocks_of, build_model, in_working_precision, load_frozen
from kinema.training.step_bytes import DTYPES
from kinema.training.tasks import Reconstruction, Task, TextToVideo
from kinema.training.warm_up import Trial, made_up

CLOSE = 0.02
"""The search ends when what fits and what does not are this close to each other."""
TIMED = 2
"""Runs of a result; the fastest counts, as the first one chooses kernels."""


@dataclass(frozen=True)
class Found:
    """What was found for one resolution and length.

    Attributes:
        length: the prediction that the search began with.
        most: the most clips that fit; 0: not one.
        needed: bytes of a step with so many, everything counted.
        seconds: of a forward and backward pass with so many; None where it was not run.
    """

    length: LengthFit
    most: int
    needed: int
    seconds: float | None


@dataclass(frozen=True)
class BatchSizes:
    """Results of all lengths, the recipe with the most of each, and one with equal step times."""

    found: list[Found]
    available: int
    largest: TrainRecipe
    equal: TrainRecipe


def search(fits: Callable[[int], bool], guess: int, limit: int) -> int:
    """The most of which `fits` holds, within `CLOSE`; 0: of none.

    Doubles from a guess until it fails (or halves until it holds), then bisects.

    Args:
        limit: more are not looked for.
    """
    low, high = 0, 0  # fits; does not (0: not known)
    number = max(1, min(guess, limit))
    while True:
        if fits(number):
            low = number
        else:
            high = number
        if low >= limit or high == 1 or (high and high - low <= max(1, CLOSE * low)):
            return low
        if not high:
            number = min(low * 2, limit)
        elif not low:
            number = high // 2
        else:
            number = (low + high) // 2


def find_batch_sizes(
    recipe: TrainRecipe,
    *,
    device: str | None = None,
    fraction: float = 0.9,
    limit: int | None = None,
    ranks: int = 1,
) -> BatchSizes:
    """Try every resolution and length that has clips.

    Args:
        device: `cpu` or `cuda`; a GPU where there is one by default.
        fraction: of the device's memory that a run may take.
        limit: bytes to take as the device's memory; needed on a CPU.
        ranks: of the run to come, which share out what the recipe shards.

    Raises:
        KinemaError: more than one process; a CPU without a limit; what `kinema train` refuses.
    """
    if recipe.data.path is None:
        raise ConfigError(
            "no manifest is named", where="data.path", hint="--data-path clips.parquet"
        )
    with ExitStack() as stack:
        sharded = recipe.parallel.shard != "none"
        world = stack.enter_context(open_world(device, group=sharded))
        if world.size > 1:
            raise KinemaError(
                f"--find-batch-size tries in one process, and these are {world.size}",
                hint=f"without torchrun: kinema train RECIPE --find-batch-size "
                f"--for-gpus {world.size}",
            )
        on_gpu = world.device.type == "cuda"
        if limit is None:
            if not on_gpu:
                raise ConfigError(
                    "a CPU's memory belongs to all: say how much a run may take",
                    where="--memory-limit",
                    hint="--memory-limit 8GB",
                )
            limit = int(torch.cuda.get_device_properties(world.device).total_memory)
        available = int(fraction * limit)
        clips = Manifest.read(recipe.data.path, data_root=recipe.data.root)
        if isinstance(recipe.task, TextToVideoTask):
            clips.require_captions()
        local = min(ranks, torch.cuda.device_count() or 1) if on_gpu else 1
        memory = predict(
            recipe, world_size=ranks, local_size=local, device="cuda" if on_gpu else "cpu"
        )
        # Clips that several ranks share cannot be tried by one, and are told apart below.
        alone = replace(
            recipe, parallel=replace(recipe.parallel, sequence=1, sequence_tokens=32768)
        )
        order = order_of(alone, clips, ranks)
        predicted = fit(alone, order, memory, available)
        runner = _Runner(recipe, clips, world)
        found = []
        with Progress("trying batch sizes", total=len(predicted), unit="bucket") as bar:
            for length in predicted:
                found.append(_find(length, recipe, memory, runner, available, measure=on_gpu))
                bar.advance(note=str(length.bucket))
    return _suggestions(recipe, found, available)


class _Runner:
    """Runs micro-batches as `kinema train` does, in one process, without an optimizer."""

    def __init__(self, recipe: TrainRecipe, clips: Manifest, world: World) -> None:
        self._recipe = recipe
        self._clips = clips
        self._device = world.device
        self._world = world
        if isinstance(recipe.task, TextToVideoTask):
            frozen = load_frozen(recipe, clips, world.device)
            if frozen.vae is not None:
                in_working_precision(frozen.vae, recipe.precision, world.device)
            groups = SequenceGroups(world, 1)
            self._task: Task = TextToVideo(recipe, frozen.vae, frozen.text, None, Spans(), groups)
        else:
            self._task = Reconstruction(recipe, Spans())
        self._build()
        # Under sharding these come and go with a step; `FixedBytes` has them as always there.
        here = predict(recipe, world_size=1, local_size=1).fixed
        self._counted = here.working + here.gradients if self._engine.sharded else 0

    def _build(self) -> None:
        recipe = self._recipe
        model = build_model(recipe).train()
        parallel: ParallelConfig = replace(recipe.parallel, shard_over="all")
        self._engine = Engine(
            model,
            self._world,
            parallel,
            dtype=DTYPES[recipe.precision],
            blocks=blocks_of(recipe),
        )
        self._model = model
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._gradients = self._engine.gradients(trained)

    def seconds(self, trial: Trial) -> float:
        """Of a forward and backward pass."""
        batch = made_up(trial, self._recipe, self._clips).to(self._device)
        self._wait()
        start = time.perf_counter()
        self._gradients.zero()
        self._gradients.expect(last=True)
        draws = Draws(self._recipe.seed, 0, int(batch.rows[0]), self._device)
        with self._engine.forward():
            loss = self._task.loss(self._model, batch, draws).loss
        loss.backward()
        self._gradients.finish()
        self._gradients.zero()
        self._wait()
        return time.perf_counter() - start

    def measured(self, trial: Trial) -> int | None:
        """Bytes that a pass adds on the GPU to what is always there; None: more than there are."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        fits = True
        try:
            self.seconds(trial)
        except torch.OutOfMemoryError:
            fits = False
        if not fits:  # out here, where the traceback's frames hold no tensors any more
            if not self._engine.recover():
                del self._model, self._engine, self._gradients
                gc.collect()
                self._build()
            self._gradients.zero()
            gc.collect()
            return None
        # What is reserved counts: pieces that nothing fits into are taken all the same.
        return int(torch.cuda.max_memory_reserved(self._device)) - before - self._counted

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _find(
    length: LengthFit,
    recipe: TrainRecipe,
    memory: MemoryPlan,
    runner: _Runner,
    available: int,
    *,
    measure: bool,
) -> Found:
    bucket = length.bucket
    shared = memory.degree(bucket)
    needed: dict[int, int] = {}

    def fits(clips: int) -> bool:
        trial = Trial(bucket, clips, 1, 0)
        if measure and shared == 1:
            step = runner.measured(trial)
            if step is None:
                return False
            needed[clips] = memory.fixed.total + step
        else:
            needed[clips] = memory.needed(bucket, clips)
        return needed[clips] <= available

    most = search(fits, min(length.most or 1, length.useful), length.useful)
    seconds = None
    if most and shared == 1:
        trial = Trial(bucket, most, 1, 0)
        seconds = min(runner.seconds(trial) for _ in range(TIMED))
    return Found(length, most, needed.get(most, memory.needed(bucket, 1)), seconds)


def _suggestions(recipe: TrainRecipe, found: list[Found], available: int) -> BatchSizes:
    most = {(f.length.bucket.resolution, f.length.bucket.frames): f.most for f in found if f.most}
    timed = [replace(f.length, most=f.most, cost=f.seconds / f.most) for f in found if f.seconds]
    return BatchSizes(
        found=found,
        available=available,
        largest=with_batches(recipe, most),
        equal=with_batches(recipe, equal_batches(timed)),
    )
