"""What a run takes before it is started: steps, time, GPU hours, links, decoding, checkpoints.

Time follows from one number, the *efficiency*: the share of the GPUs' peak at which all work of a
step is done, recomputation and frozen networks counted (`training.cost`). A step lasts as long as
its most loaded rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kinema.data.buckets import Bucket, BucketTable
from kinema.data.manifest import Manifest
from kinema.data.order import SampleOrder
from kinema.data.plan import Plan, make_plan
from kinema.models.config import T5TextConfig
from kinema.parallel.config import ParallelConfig
from kinema.training.config import TextToVideoTask, TrainRecipe
from kinema.training.cost import bucket_cost, bucket_degree, tokens_per_clip
from kinema.training.gpus import GPU
from kinema.training.memory import network_on_meta, sharing_ranks
from kinema.training.step_bytes import DTYPES

EFFICIENCY = 0.15
"""Where none is given. Open-Sora 1.2's batch sizes were sought so that a step of any bucket takes
12 seconds, on GPUs of 989 TFLOP/s: by our count of FLOPs 12 to 20 % of peak wherever memory left
room, 15 % in the middle. Open-Sora 1.1's published rates on such GPUs come to 14 to 20 %."""
DECODE_RATE = 38 * 1280 * 720
"""Pixels per second that one core decodes and scales (`benchmarks/decode.py`, 32 consecutive frames
of a 720p clip, from a keyframe before them)."""
NETWORK = 50e9
"""Bytes/s per GPU to other machines, in one direction: one link of 400 Gbit/s for each GPU."""


@dataclass(frozen=True)
class Cluster:
    """Where a run is planned to be.

    Attributes:
        gpus: of all machines.
        per_node: GPUs of one machine.
        network: bytes/s per GPU to other machines.
    """

    gpu: GPU
    gpus: int
    per_node: int = 8
    network: float = NETWORK

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.per_node)


@dataclass(frozen=True)
class Communication:
    """What one rank sends in a step.

    Attributes:
        weights_bytes: gathered weights and averaged gradients, within and across machines.
        sequence_bytes: tokens that change hands between ranks that share clips, on average.
        seconds: how long that takes at the links' full rate, one after the other.
    """

    weights_bytes: float
    sequence_bytes: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A run in numbers.

    Attributes:
        plan: of the first epoch.
        epochs: passes over the data.
        steps: of the whole run: of all epochs, or `max_steps` if that is less.
        published_steps: of an epoch by the originals' rule: full micro-batches only, what is left
            of a bucket dropped.
        step_seconds: mean.
        communication: of a step, on each rank.
        epoch_gpu_hours: computing alone; so with `gpu_hours` and `days`.
        decoded_per_s: clips, of all ranks.
        decode_cores: per machine.
        checkpoint_bytes: weights, average and optimizer.
        cached_latents, cached_text: GPU hours of an epoch that caches save.
    """

    plan: Plan
    efficiency: float
    epochs: int
    steps: int
    published_steps: int
    step_seconds: float
    communication: Communication
    epoch_gpu_hours: float
    decoded_per_s: float
    decode_cores: float
    checkpoint_bytes: int
    cached_latents: float
    cached_text: float
    gpus: int

    @property
    def gpu_hours(self) -> float:
        return self.steps * self.step_seconds * self.gpus / 3600

    @property
    def days(self) -> float:
        return self.steps * self.step_seconds / 86400


def order_of(recipe: TrainRecipe, clips: Manifest, world_size: int) -> SampleOrder:
    """The order that training by a recipe has on so many ranks."""
    return SampleOrder(
        clips,
        BucketTable.from_config(recipe.data),
        bucket_cost(recipe),
        seed=recipe.seed,
        world_size=world_size,
        accumulation=recipe.accumulation,
        degree=bucket_degree(recipe),
    )


def estimate(
    recipe: TrainRecipe,
    clips: Manifest,
    order: SampleOrder,
    cluster: Cluster,
    *,
    efficiency: float = EFFICIENCY,
    epochs: int | None = None,
) -> Estimate:
    """The numbers of a run.

    Args:
        order: `order_of(recipe, clips, cluster.gpus)`.
        efficiency: share of the GPUs' peak.
        epochs: in place of the recipe's.

    Raises:
        NoMicroBatchesError: no clip trains; says why.
    """
    plan = make_plan(clips, order, tokens=tokens_per_clip(recipe))
    seconds = epoch_flops_waited(order) / (efficiency * cluster.gpu.peak)
    epochs = recipe.epochs if epochs is None else epochs
    steps = epochs * plan.steps_per_epoch
    if recipe.max_steps is not None:
        steps = min(steps, recipe.max_steps)
    epoch_gpu_hours = seconds * cluster.gpus / 3600
    network = network_on_meta(recipe)
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    average = 0 if recipe.ema_decay is None else parameters
    pixels = 0.0 if recipe.latent_cache else _decoded_pixels(recipe, clips, order)
    return Estimate(
        plan=plan,
        efficiency=efficiency,
        epochs=epochs,
        steps=steps,
        published_steps=published_steps(order),
        step_seconds=seconds / plan.steps_per_epoch,
        communication=communication(recipe, plan, cluster, parameters, trained),
        epoch_gpu_hours=epoch_gpu_hours,
        decoded_per_s=0.0 if recipe.latent_cache else plan.samples / seconds,
        decode_cores=pixels / seconds / DECODE_RATE / cluster.nodes,
        checkpoint_bytes=4 * (parameters + average + 2 * trained),
        cached_latents=epoch_gpu_hours * _saved(recipe, order, _with_latents(recipe)),
        cached_text=epoch_gpu_hours * _saved(recipe, order, _with_text(recipe)),
        gpus=cluster.gpus,
    )


def published_steps(order: SampleOrder, epoch: int = 0) -> int:
    """Steps of an epoch by the rule of the originals' sampler: each bucket gives as many full
    micro-batches as it has, its rest is dropped, and so is what does not fill a last step."""
    assigned = order.assign(epoch)[order.manifest.kept]
    rows = np.bincount(assigned[assigned >= 0], minlength=len(order.table.buckets))
    limit = np.array([b.max_batch for b in order.table.buckets])
    degree = np.array([order.degree(b) for b in order.table.buckets])
    return int((rows // limit * degree).sum()) // (order.world_size * order.accumulation)


def epoch_flops_waited(order: SampleOrder) -> float:
    """FLOPs of the most loaded rank of every micro-step of the first epoch, added up."""
    layout = order.epoch(0).layout
    flops = np.array([order.flops(b) for b in order.table.buckets])
    price = layout.size * flops[layout.bucket] / layout.degree
    return float(price[layout.slots].max(axis=1).sum())


def communication(
    recipe: TrainRecipe, plan: Plan, cluster: Cluster, parameters: int, trained: int
) -> Communication:
    """What a rank sends per step, by the formulas of `docs/plan.md`."""
    parallel, world = recipe.parallel, cluster.gpus
    half = DTYPES[recipe.precision].itemsize
    share = sharing_ranks(parallel, world, min(cluster.per_node, world))
    copies = world // share
    gathers = {"none": 0, "zero2": 1, "zero3": 1 + recipe.accumulation}[parallel.shard]
    scatters = 0 if parallel.shard == "none" else recipe.accumulation
    inside = (share - 1) / share * (gathers * half * parameters + scatters * 4 * trained)
    # Copies of the model average what each holds: an all-reduce is a scatter and a gather.
    across = 2 * (copies - 1) / copies * 4 * trained / share
    spans = world > cluster.per_node
    inside_rate = cluster.network if spans and share > cluster.per_node else cluster.gpu.link
    seconds = inside / inside_rate + across / (cluster.network if spans else cluster.gpu.link)
    sent = _sequence_bytes(recipe, plan, parallel, half) / max(plan.steps_per_epoch * world, 1)
    over = parallel.sequence > cluster.per_node
    seconds += sent / (cluster.network if over else cluster.gpu.link)
    return Communication(inside + across, sent, seconds)


def _sequence_bytes(recipe: TrainRecipe, plan: Plan, parallel: ParallelConfig, half: int) -> float:
    """Of an epoch and all ranks: around attention in time tokens go one way and come back, in the
    forward pass, the backward pass, and a third time where everything is recomputed."""
    model = recipe.model
    if model is None or parallel.sequence == 1:
        return 0.0
    total = 0.0
    passes = 3 if recipe.recompute == "full" else 2
    for bucket in plan.buckets:
        assert bucket.tokens is not None
        total += bucket.tokens * (bucket.degree - 1) / bucket.degree * passes
    return total * model.depth * 2 * model.hidden_size * half


def _decoded_pixels(recipe: TrainRecipe, clips: Manifest, order: SampleOrder) -> float:
    """Pixels of the source videos that an epoch decodes."""
    assigned = order.assign(0)
    used = (assigned >= 0) & clips.kept
    frames = np.array([b.frames for b in order.table.buckets])
    step = recipe.data.frame_interval
    span = np.where(frames > 1, frames * step, 1)[assigned[used]]
    area = clips.column("height")[used].astype(np.float64) * clips.column("width")[used]
    return float((span * area).sum())


def _saved(recipe: TrainRecipe, order: SampleOrder, cached: TrainRecipe) -> float:
    """Part of an epoch's FLOPs that a cache saves."""
    if not isinstance(recipe.task, TextToVideoTask):
        return 0.0
    return 1 - flops_with(cached, order) / flops_with(recipe, order)


def _with_latents(recipe: TrainRecipe) -> TrainRecipe:
    task = recipe.task
    if not isinstance(task, TextToVideoTask) or task.remember_latents:
        return recipe
    return replace(recipe, latent_cache="there")


def _with_text(recipe: TrainRecipe) -> TrainRecipe:
    if recipe.text is None or not isinstance(recipe.text, T5TextConfig):
        return recipe  # others cost next to nothing, and have no cache
    return replace(recipe, text_cache="there")


def flops_with(recipe: TrainRecipe, order: SampleOrder) -> float:
    """FLOPs of the first epoch's clips under another recipe of the same buckets."""
    return _of_clips(order, bucket_cost(recipe))


def _of_clips(order: SampleOrder, cost: Callable[[Bucket], float]) -> float:
    layout = order.epoch(0).layout
    samples = np.bincount(layout.bucket, layout.size, minlength=len(order.table.buckets))
    pairs = zip(samples, order.table.buckets, strict=True)
    return math.fsum(count * cost(bucket) for count, bucket in pairs if count)
