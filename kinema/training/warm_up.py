"""Every bucket's largest micro-batch once before step one: what does not fit fails at once.

The largest comes first, so that memory is asked for once and in the largest pieces. Pixels,
latents and sizes are made up; everything else is the code of a step, in the group of all ranks.
Gradients are thrown away, and nothing else has changed when it is over.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kinema.config.errors import KinemaError
from kinema.data.buckets import Bucket
from kinema.data.loader import Batch, ClipKey
from kinema.data.manifest import Manifest
from kinema.data.order import SampleOrder
from kinema.parallel.world import World
from kinema.telemetry.progress import Progress
from kinema.training.config import TrainRecipe
from kinema.training.memory import MemoryPlan, predict

LOOKED_AT = 1000
"""Captions among which the longest is taken."""


@dataclass(frozen=True)
class Trial:
    """A micro-batch to try.

    Attributes:
        degree: ranks that share it.
        predicted: bytes at the peak of a step with it, everything counted.
    """

    bucket: Bucket
    clips: int
    degree: int
    predicted: int


def wanted(recipe: TrainRecipe, device: torch.device) -> bool:
    """Whether the recipe asks for it on this device."""
    return recipe.warm_up == "yes" or (recipe.warm_up == "auto" and device.type == "cuda")


def trials(recipe: TrainRecipe, order: SampleOrder, epoch: int, world: World) -> list[Trial]:
    """The largest micro-batch of every bucket that has clips in an epoch, the largest first.

    The same on every rank.
    """
    memory = predict(
        recipe,
        world_size=world.size,
        local_size=world.local_size,
        device="cuda" if world.device.type == "cuda" else "cpu",
    )
    counts = np.bincount(
        order.assign(epoch).clip(-1)[order.manifest.kept] + 1,
        minlength=len(order.table.buckets) + 1,
    )[1:]
    found = [
        _trial(memory, order, bucket, min(int(count), bucket.max_batch))
        for bucket, count in zip(order.table.buckets, counts, strict=True)
        if count
    ]
    return sorted(found, key=lambda t: (-t.predicted, t.bucket.index))


def _trial(memory: MemoryPlan, order: SampleOrder, bucket: Bucket, clips: int) -> Trial:
    degree = order.degree(bucket)
    return Trial(bucket, clips, degree, memory.of(bucket, clips, degree))


def made_up(trial: Trial, recipe: TrainRecipe, manifest: Manifest) -> Batch:
    """A micro-batch of a trial's size, on the CPU, the same at each call.

    Its captions are the longest of the first ones of the manifest: a cache of text has those only.
    """
    kept = np.flatnonzero(manifest.kept)[:LOOKED_AT]
    row = max((int(row) for row in kept), key=lambda row: len(manifest.text(row)))
    bucket, clips = trial.bucket, trial.clips
    latents, pixels = None, clips
    if recipe.latent_cache is not None:
        size = recipe.vae.latent_size(bucket.frames, bucket.height, bucket.width)
        shape = (clips, recipe.vae.latent_channels, *size)
        latents, pixels = (torch.zeros(shape), torch.ones(shape)), 0
    return Batch(
        video=torch.zeros(pixels, 3, bucket.frames, bucket.height, bucket.width),
        text=[manifest.text(row)] * clips,
        fps=torch.full((clips,), 24.0),
        rows=np.full(clips, row, dtype=np.int64),
        # Rows that no clip has: nobody must take these pixels for a clip's.
        keys=tuple(
            ClipKey(-1 - i, 0, bucket.frames, bucket.height, bucket.width) for i in range(clips)
        ),
        decoded=(latents is None,) * clips,
        bucket=bucket,
        weight=1.0,
        degree=trial.degree,
        skipped=[],
        latents=latents,
    )


def warm_up(
    planned: Sequence[Trial],
    attempt: Callable[[Trial], None],
    world: World,
) -> None:
    """Run every trial.

    Args:
        planned: the same on every rank.
        attempt: forward and backward of one.

    Raises:
        KinemaError: out of memory: names bucket, micro-batch, what was predicted, what there is,
            rank and node. On the ranks where it happened; the others are ended by their launcher.
    """
    total = len(planned)
    if not world.is_main:
        for trial in planned:
            _try(trial, attempt, world)
        return
    with Progress("trying every bucket, the largest first", total=total, unit="bucket") as bar:
        for trial in planned:
            _try(trial, attempt, world)
            bar.advance(note=str(trial.bucket))


def _try(trial: Trial, attempt: Callable[[Trial], None], world: World) -> None:
    problem: RuntimeError
    try:
        attempt(trial)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    except torch.OutOfMemoryError as error:
        problem = error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU's words for it
            raise
        problem = error
    else:
        return
    shared = f", shared by {trial.degree} ranks" if trial.degree > 1 else ""
    raise KinemaError(
        f"bucket {trial.bucket} does not fit with {trial.clips} clips{shared}: a step takes about "
        f"{_gb(trial.predicted)}, and {_memory(world)}",
        where=f"rank {world.rank} on {socket.gethostname()}",
        hint="a smaller batch size for this bucket in data.buckets, recompute: full, "
        "parallel.sequence for long clips, parallel.shard; --find-batch-size measures what fits",
    ) from problem


def _memory(world: World) -> str:
    if world.device.type != "cuda":
        return "this machine has no more memory for it"
    free, total = torch.cuda.mem_get_info(world.device)
    own = torch.cuda.memory_reserved(world.device)
    return (
        f"the GPU has {_gb(total)}, of which {_gb(free)} are free and {_gb(own)} are this process's"
    )


def _gb(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
