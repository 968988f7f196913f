"""Which buckets fit a GPU, and which batch sizes, recomputation and sharing would fit better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kinema.data.buckets import Bucket
from kinema.data.config import BucketSettings, DataConfig
from kinema.data.order import SampleOrder
from kinema.telemetry.progress import Progress
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost, bucket_degree, tokens_per_clip
from kinema.training.memory import MemoryPlan, predict

MOST_SHARING = 8
"""Ranks of one clip that are suggested at most: those of a machine."""
PERCENTILE = 10
"""Of what buckets can hold at most (in cost, weighted by their work), where equal steps are set: a
few small buckets must not hold all others down."""


@dataclass(frozen=True)
class LengthFit:
    """One resolution and length on a GPU, by its largest size among those that clips have.

    Attributes:
        bucket: that size.
        batch: clips of a micro-batch, as the recipe says.
        degree: ranks that share it.
        needed: bytes at the peak of a step, with room for what is not counted.
        encodes: the peak is the autoencoder's, whose `micro_batch_size` decides it.
        most: the most clips that fit; 0: not one.
        useful: more than this one rank never gets at once: its part of an epoch's clips.
        cost: FLOPs per clip and rank.
        work: FLOPs of an epoch.
    """

    bucket: Bucket
    batch: int
    degree: int
    needed: int
    encodes: bool
    most: int
    useful: int
    cost: float
    work: float

    @property
    def fits(self) -> bool:
        return self.most >= self.batch


@dataclass(frozen=True)
class RecomputeFit:
    """A recomputation setting for the whole recipe.

    Attributes:
        kind: `recompute`.
        fits: whether the buckets that need most fit with it.
        needed: bytes of the neediest.
        flops: of an epoch, relative to the recipe's own.
    """

    kind: Literal["none", "selective", "full"]
    fits: bool
    needed: int
    flops: float


def used_lengths(order: SampleOrder, recipe: TrainRecipe) -> dict[tuple[str, int], Bucket]:
    """Of each resolution and length that has clips, the size of the most tokens (or pixels)."""
    tokens = tokens_per_clip(recipe)
    layout = order.epoch(0).layout
    found: dict[tuple[str, int], Bucket] = {}

    def size(bucket: Bucket) -> tuple[int, int]:
        pixels = bucket.height * bucket.width
        return (pixels if tokens is None else tokens(bucket), pixels)

    for index in np.unique(layout.bucket):
        bucket = order.table.buckets[index]
        key = (bucket.resolution, bucket.frames)
        if key not in found or size(bucket) > size(found[key]):
            found[key] = bucket
    return found


def fit(
    recipe: TrainRecipe, order: SampleOrder, memory: MemoryPlan, available: int
) -> list[LengthFit]:
    """Every resolution and length that has clips, against `available` bytes of a GPU."""
    cost, degree = bucket_cost(recipe), bucket_degree(recipe)
    layout = order.epoch(0).layout
    buckets = order.table.buckets
    samples = np.bincount(layout.bucket, layout.size, minlength=len(buckets))
    work: dict[tuple[str, int], float] = {}
    clips: dict[tuple[str, int], int] = {}
    for b in buckets:
        key = (b.resolution, b.frames)
        work[key] = work.get(key, 0.0) + float(samples[b.index]) * cost(b)
        clips[key] = clips.get(key, 0) + int(samples[b.index])
    found = []
    lengths = used_lengths(order, recipe)
    with Progress("counting memory", total=len(lengths), unit="bucket") as bar:
        for key, b in lengths.items():
            found.append(
                LengthFit(
                    bucket=b,
                    batch=b.max_batch,
                    degree=degree(b),
                    needed=memory.needed(b, b.max_batch),
                    encodes=memory.encodes_at_peak(b, b.max_batch),
                    most=memory.most_clips(b, available, near=b.max_batch),
                    useful=max(b.max_batch, -(-clips[key] * degree(b) // order.world_size)),
                    cost=cost(b) / degree(b),
                    work=work[key],
                )
            )
            bar.advance(1)
    return found


def equal_batches(lengths: list[LengthFit]) -> dict[tuple[str, int], int]:
    """Batch sizes of equal cost that fit, by resolution and frames; lengths of which not one clip
    fits are left out.

    The cost of a micro-batch is what nine tenths of the work could reach, and at least that of the
    costliest single clip.
    """
    able = [item for item in lengths if item.most]
    if not able:
        return {}
    most = [min(item.most, item.useful) for item in able]
    reach = np.array([n * item.cost for n, item in zip(most, able, strict=True)])
    by_reach = np.argsort(reach)
    work = np.cumsum(np.array([item.work for item in able])[by_reach])
    place = int(np.searchsorted(work, work[-1] * PERCENTILE / 100))
    target = max(float(reach[by_reach][place]), max(item.cost for item in able))
    return {
        (item.bucket.resolution, item.bucket.frames): int(
            max(1, min(n, (1 + 1e-9) * target // item.cost))
        )
        for n, item in zip(most, able, strict=True)
    }


def with_batches(recipe: TrainRecipe, batches: dict[tuple[str, int], int]) -> TrainRecipe:
    """The recipe with other batch sizes."""
    buckets: dict[str, dict[int, BucketSettings]] = {
        name: {
            frames: (keep, batches.get((name, frames), batch))
            for frames, (keep, batch) in lengths.items()
        }
        for name, lengths in recipe.data.buckets.items()
    }
    data: DataConfig = replace(recipe.data, buckets=buckets)
    return replace(recipe, data=data)


def as_yaml(recipe: TrainRecipe) -> str:
    """The buckets of a recipe as lines to paste into one."""
    lines = ["data:", "  buckets: !replace"]
    for name, lengths in recipe.data.buckets.items():
        inside = ", ".join(
            f"{frames}: [{_number(keep)}, {'null' if batch is None else batch}]"
            for frames, (keep, batch) in lengths.items()
        )
        lines.append(f'    "{name}": {{{inside}}}')
    return "\n".join(lines)


def _number(keep: float | tuple[float, float]) -> str:
    return str(list(keep)) if isinstance(keep, tuple) else str(keep)


def recompute_choices(
    recipe: TrainRecipe,
    order: SampleOrder,
    lengths: list[LengthFit],
    available: int,
    *,
    world_size: int,
    local_size: int,
) -> list[RecomputeFit]:
    """None, selective and full recomputation at the recipe's batch sizes, judged by the three
    lengths that need most."""
    from kinema.training.estimate import flops_with

    if recipe.model is None:
        return []
    neediest = sorted(lengths, key=lambda item: -item.needed)[:3]
    own = flops_with(recipe, order)
    found = []
    for kind in ("none", "selective", "full"):
        every = recipe.recompute_every if kind != "none" else 1
        other = replace(recipe, recompute=kind, recompute_every=every)
        memory = predict(other, world_size=world_size, local_size=local_size)
        needed = max(memory.needed(item.bucket, item.batch) for item in neediest)
        found.append(
            RecomputeFit(kind, needed <= available, needed, flops_with(other, order) / own)
        )
    return found


def sharing_that_fits(item: LengthFit, memory: MemoryPlan, available: int) -> int | None:
    """The fewest ranks that have to share a clip of a length for one to fit; None: more than the
    ranks of a machine."""
    degree = max(2, 2 * item.degree)
    while degree <= MOST_SHARING:
        if memory.needed(item.bucket, 1, degree) <= available:
            return degree
        degree *= 2
    return None
