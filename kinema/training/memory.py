"""How much memory training takes on a device, before anything runs: what is always there by the
layout of a run, and what a step adds by the shape of its micro-batch.

The first follows from the shapes of the parameters; the second is counted by running the real
networks without computing (`step_bytes.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn

from kinema.data.buckets import Bucket
from kinema.generation.memory import CUDA_CONTEXT, SLACK, in_words, weight_bytes
from kinema.models.config import CLIPTextConfig, T5TextConfig, TextConfig
from kinema.models.config_text import T5_SIZES, T5Size
from kinema.parallel.config import ParallelConfig
from kinema.parallel.recompute import is_below
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_degree
from kinema.training.counted_kernels import DeviceType
from kinema.training.ema import NOT_AVERAGED
from kinema.training.parts import blocks_of, build_model
from kinema.training.step_bytes import DTYPES, META, StepBytes

NCCL_BYTES = 700 * 2**20
"""What NCCL's channels take on a GPU that belongs to a group; more for more groups."""
SHARED = 2
"""Blocks under way at once while one is gathered (or its gradients sent) and one computes."""
T5_VOCABULARY = 32128
CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class FixedBytes:
    """Bytes on each rank that do not depend on what a step trains on.

    Attributes:
        weights: float32 masters; this rank's part of them under sharding.
        working: weights gathered in the precision of the arithmetic (sharding only; otherwise
            autocast's copies come and go with a step, and count there).
        gradients: float32; this rank's part of them under sharding.
        optimizer: AdamW's two moments, float32.
        average: of the weights, float32.
        communication: blocks on their way: gathered, and gradients being averaged.
        autoencoder, text_encoder: frozen networks.
        context: what CUDA and NCCL take.
    """

    weights: int
    working: int
    gradients: int
    optimizer: int
    average: int
    communication: int
    autoencoder: int
    text_encoder: int
    context: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def describe(self) -> str:
        """The parts that are not zero, in words."""
        parts = {name.replace("_", " "): size for name, size in asdict(self).items()}
        return ", ".join(f"{name} {in_words(size)}" for name, size in parts.items() if size)


class MemoryPlan:
    """What a run takes on each device. Made by `predict`.

    Attributes:
        fixed: what is always there.
    """

    def __init__(self, recipe: TrainRecipe, fixed: FixedBytes, step: StepBytes) -> None:
        self.recipe = recipe
        self.fixed = fixed
        self._step = step
        self._degree = bucket_degree(recipe)

    def degree(self, bucket: Bucket) -> int:
        """Ranks that share a clip of a bucket."""
        return self._degree(bucket)

    def of(self, bucket: Bucket, clips: int, degree: int | None = None) -> int:
        """Bytes at the peak of a step on so many clips of a bucket, everything counted.

        Captions are taken to fill the text encoder, so real ones need a little less.

        Args:
            degree: ranks that share the micro-batch; by default what the recipe says.
        """
        return self.fixed.total + self.of_step(bucket, clips, degree)

    def of_step(self, bucket: Bucket, clips: int, degree: int | None = None) -> int:
        """The part of `of` that a step adds to `fixed`."""
        degree = self._degree(bucket) if degree is None else degree
        step = self._step
        encoding = step.encode(bucket, clips, degree)
        return step.inputs(bucket, clips) + max(encoding, step.model(bucket, clips, degree))

    def encodes_at_peak(self, bucket: Bucket, clips: int, degree: int | None = None) -> bool:
        """Whether the most is needed while the frozen autoencoder encodes, and not while the
        transformer trains."""
        degree = self._degree(bucket) if degree is None else degree
        step = self._step
        return step.encode(bucket, clips, degree) > step.model(bucket, clips, degree)

    def needed(self, bucket: Bucket, clips: int, degree: int | None = None) -> int:
        """`of`, with room for what is not counted: unused rests of the allocator, kernels' own
        memory."""
        return self.fixed.total + int(SLACK * self.of_step(bucket, clips, degree))

    def most_clips(
        self, bucket: Bucket, available: int, degree: int | None = None, near: int = 2
    ) -> int:
        """The most clips of a bucket of which a step fits into `available` bytes, or up to a
        fiftieth fewer; 0: none does.

        What a step takes is very nearly linear in its clips, so that two counts lead near the
        answer.

        Args:
            near: a guess, above 1.
        """

        def needed(clips: int) -> int:
            return self.needed(bucket, clips, degree)

        upper = max(near, 2)
        lower = max(1, upper // 2)
        each = max(1, (needed(upper) - needed(lower)) // (upper - lower))
        most = max(1, upper + (available - needed(upper)) // each)
        if most > 4 * upper:  # far away: once more from there
            each = max(1, (needed(most) - needed(upper)) // (most - upper))
            most = max(1, most + (available - needed(most)) // each)
        step = max(1, most // 50)
        while most > 0 and needed(most) > available:
            most -= min(step, most)
        if step == 1:
            while needed(most + 1) <= available:
                most += 1
        return most


def predict(
    recipe: TrainRecipe, *, world_size: int, local_size: int, device: DeviceType = "cuda"
) -> MemoryPlan:
    """What training by a recipe takes on each of `world_size` devices.

    Args:
        local_size: how many of them are in one machine.
        device: whose kernels run; only on `cuda` there is a context to count.

    Raises:
        KinemaError: `freeze` names nothing.
    """
    sharded = recipe.parallel.shard != "none"
    fixed = _fixed(recipe, world_size, local_size, device)
    return MemoryPlan(recipe, fixed, StepBytes(recipe, sharded=sharded, device=device))


def sharing_ranks(config: ParallelConfig, world_size: int, local_size: int) -> int:
    """Ranks that hold one copy of the weights together; 1 without sharding."""
    if config.shard == "none":
        return 1
    if config.shard_over == "all":
        return world_size
    return local_size if config.shard_over == "node" else min(config.shard_over, world_size)


def network_on_meta(recipe: TrainRecipe) -> nn.Module:
    """The whole network that trains, without values."""
    from dataclasses import replace

    with META:
        return build_model(replace(recipe, compile=False))


def _fixed(recipe: TrainRecipe, world_size: int, local_size: int, device: str) -> FixedBytes:
    model = network_on_meta(recipe)
    ranks = sharing_ranks(recipe.parallel, world_size, local_size)
    named = dict(model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    own = _part(named.values(), ranks)
    own_trained = _part(trained.values(), ranks)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())

    average = 0
    if recipe.ema_decay is not None:
        # Frozen parameters and buffers are in it as well: it is a whole model.
        kept = [p for name, p in named.items() if name != NOT_AVERAGED]
        average = _part(kept, ranks) + buffers
    working = communication = 0
    if recipe.parallel.shard != "none":
        half = DTYPES[recipe.precision].itemsize
        block = _largest_block(recipe, named)
        outside = sum(p.numel() for name, p in named.items() if not _in_block(recipe, name))
        whole = sum(p.numel() for p in named.values())
        kept_whole = recipe.parallel.shard == "zero2"
        working = half * (whole if kept_whole else outside + SHARED * block)
        # Gathering passes through a flat buffer; gradients are averaged in float32, those of one
        # block while the next one's are made in the arithmetic's precision.
        communication = SHARED * block * half + SHARED * block * (half + 4)
    elif world_size > 1:
        communication = 0  # gradients are averaged where they are
    context = 0
    if device == "cuda":
        context = CUDA_CONTEXT + (NCCL_BYTES if world_size > 1 else 0)
    vae = text = 0
    if recipe.model is not None:
        if recipe.latent_cache is None or recipe.preview or recipe.validation:
            from kinema.generation.residency import empty_vae

            vae = weight_bytes(empty_vae(recipe.vae, None))
        text = 0 if recipe.text_cache is not None else text_bytes(recipe.text)
    return FixedBytes(
        weights=own + buffers,
        working=working,
        gradients=own_trained,
        optimizer=2 * own_trained,
        average=average,
        communication=communication,
        autoencoder=vae,
        text_encoder=text,
        context=context,
    )


def text_bytes(text: TextConfig | None) -> int:
    """Bytes of a frozen text encoder's weights, from the published sizes."""
    if isinstance(text, CLIPTextConfig):
        return 4 * (12 * 12 * text.dim**2 + CLIP_VOCABULARY * text.dim)
    if not isinstance(text, T5TextConfig):
        return 0
    width = text.dim
    layers, heads, feed_forward = T5_SIZES.get(
        width, T5Size(24, max(1, width // 64), width * 5 // 2)
    )
    linear = layers * (4 * width * 64 * heads + 3 * width * feed_forward)
    each = {"fp32": 4, "bf16": 2, "int8": 1}[text.precision]
    return each * linear + max(each, 2) * T5_VOCABULARY * width


def _part(parameters: Iterable[torch.Tensor], ranks: int) -> int:
    """Bytes of one rank's part: along the first dimension, in whole rows (FSDP2 pads)."""
    total = 0
    for p in parameters:
        rows = p.shape[0] if p.ndim else 1
        total += -(-rows // ranks) * (p.numel() // max(rows, 1)) * p.element_size()
    return total


def _in_block(recipe: TrainRecipe, name: str) -> bool:
    return any(is_below(name, pattern) for pattern in blocks_of(recipe))


def _largest_block(recipe: TrainRecipe, named: dict[str, nn.Parameter]) -> int:
    """Numbers in the largest of the modules that are gathered at once."""
    sizes: dict[str, int] = {}
    for name, parameter in named.items():
        for pattern in blocks_of(recipe):
            if is_below(name, pattern):
                block = ".".join(name.split(".")[: pattern.count(".") + 1])
                sizes[block] = sizes.get(block, 0) + parameter.numel()
    return max(sizes.values(), default=0)
