"""What a step costs: the one formula, used by the sample order, the plan and the log.

Per sample of a bucket, in FLOPs (matrix products, multiply-add = 2):

- text-to-video: transformer forward x 3 (forward, and backward twice that); + what is recomputed;
  + encoding by the frozen autoencoder unless latents are remembered or cached; + the text encoder
  unless its embeddings are cached.
- vae: (encode + decode) forward x 3; + what is recomputed.

Recomputed is, of each so-manyth block (`recompute_every`): a whole forward (`full`), or the
products whose results are not kept (`selective`: `widening_flops`; nothing in the autoencoder,
whose convolutions are all kept).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from kinema.training.config import TextToVideoTask, TrainRecipe


class Shape(Protocol):
    """What the formula needs of a bucket: frames and pixels of its videos."""

    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


def bucket_cost(recipe: TrainRecipe) -> Callable[[Shape], float]:
    """FLOPs that one sample of a bucket costs in a training step under `recipe`."""
    vae, kind = recipe.vae, recipe.recompute

    def text_to_video(bucket: Shape) -> float:
        assert isinstance(recipe.task, TextToVideoTask)
        assert recipe.model is not None
        assert recipe.text is not None
        size = (bucket.frames, bucket.height, bucket.width)
        model, seen = recipe.model, (vae.latent_size(*size), recipe.text.max_tokens)
        flops = 3 * model.forward_flops(*seen)
        if kind != "none":
            again = model.forward_flops if kind == "full" else model.widening_flops
            flops += math.ceil(model.depth / recipe.recompute_every) / model.depth * again(*seen)
        if not recipe.task.remember_latents and recipe.latent_cache is None:
            flops += vae.encode_flops(*size)
        return flops if recipe.text_cache else flops + recipe.text.encode_flops()

    def autoencoder(bucket: Shape) -> float:
        size = (bucket.frames, bucket.height, bucket.width)
        passes = 3 + 1 / recipe.recompute_every if kind == "full" else 3
        return passes * (vae.encode_flops(*size) + vae.decode_flops(*size))

    return text_to_video if isinstance(recipe.task, TextToVideoTask) else autoencoder


def useful_flops(recipe: TrainRecipe) -> Callable[[Shape], float]:
    """FLOPs per sample of a bucket that MFU counts: those of the network that trains, forward x 3,
    whatever is recomputed; frozen networks are not in it, as in published figures."""
    model, text, vae = recipe.model, recipe.text, recipe.vae

    def useful(bucket: Shape) -> float:
        size = (bucket.frames, bucket.height, bucket.width)
        if model is None or text is None:
            return 3 * (vae.encode_flops(*size) + vae.decode_flops(*size))
        return 3 * model.forward_flops(vae.latent_size(*size), text.max_tokens)

    return useful


def tokens_per_clip(recipe: TrainRecipe) -> Callable[[Shape], int] | None:
    """Tokens that the transformer sees of one clip of a bucket; None where none trains."""
    model, vae = recipe.model, recipe.vae
    if model is None:
        return None
    return lambda bucket: model.num_tokens(
        vae.latent_size(bucket.frames, bucket.height, bucket.width)
    )


def bucket_degree(recipe: TrainRecipe) -> Callable[[Shape], int]:
    """How many ranks share a clip of a bucket (sequence parallelism)."""
    tokens = tokens_per_clip(recipe)
    if tokens is None or recipe.parallel.sequence == 1:
        return lambda bucket: 1

    def degree(bucket: Shape) -> int:
        frames = recipe.vae.latent_size(bucket.frames, bucket.height, bucket.width)[0]
        return recipe.parallel.degree(tokens(bucket), frames)

    return degree
