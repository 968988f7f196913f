"""Steps of training per bucket: `python benchmarks/training.py [--recipes opensora-1.2/stage1]`.

Prints one markdown table. A step is what `kinema train` computes: encoding by the autoencoder (or
latents from a cache: `--features`), forward, backward, clipping, AdamW, the average; text comes
from a cache. Weights are random, pixels are zeros. The largest micro-batch of each resolution and
length is taken, at its size of about 16:9; where memory runs out, half of it. MFU counts three
forward passes of the transformer and nothing else, over the GPU's dense bf16 peak; on a CPU the
share is of the matrix-product rate of the same run, the networks are small (`--small`: 2 block
pairs, 192 wide), and micro-batches are of one clip.
"""

from __future__ import annotations

import argparse
import gc
import resource
from collections.abc import Sequence
from datetime import date
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stdit3 import _hardware, _median_seconds, matmul_rate
from torch import Tensor

from kinema.config.recipe import load_recipe
from kinema.data.buckets import Bucket, BucketTable
from kinema.data.loader import Batch, ClipKey
from kinema.models.build import build_vae
from kinema.parallel.engine import Engine
from kinema.parallel.sequence import SequenceGroups
from kinema.parallel.world import World, open_world
from kinema.telemetry.peaks import bf16_tflops
from kinema.telemetry.spans import Spans
from kinema.training.config import TrainRecipe
from kinema.training.cost import tokens_per_clip, useful_flops
from kinema.training.draws import Draws
from kinema.training.ema import EMA
from kinema.training.optimizer import build_optimizer
from kinema.training.parts import blocks_of, build_model, in_working_precision
from kinema.training.step_bytes import DTYPES
from kinema.training.tasks import TextToVideo

SMALL = ["model.depth=2", "model.hidden_size=192", "model.num_heads=6", "precision=fp32"]
SMALL_TOKENS = 4000
"""On a CPU: buckets of more are left out."""


class Text:
    """Text features as a cache gives them: random ones, as long as MFU counts them."""

    encoder = None

    def __init__(self, recipe: TrainRecipe) -> None:
        assert recipe.text is not None
        self._length, self._dim = recipe.text.max_tokens, recipe.text.dim

    def features(
        self, texts: Sequence[str], rows: NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        y = torch.randn(len(texts), 1, self._length, self._dim, device=device)
        return y, torch.ones(len(texts), self._length, dtype=torch.bool)


class Step:
    """A training step on this device."""

    def __init__(self, recipe: TrainRecipe, world: World, *, features: bool) -> None:
        self.recipe, self.world, self._features = recipe, world, features
        self._model = build_model(recipe).train()
        with torch.no_grad():  # products with zeros draw less power, and so run at a higher clock
            for parameter in self._model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.02)
        dtype = DTYPES[recipe.precision]
        self._engine = Engine(
            self._model, world, recipe.parallel, dtype=dtype, blocks=blocks_of(recipe)
        )
        trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = build_optimizer(trained, recipe.optim)
        self._ema = EMA(self._model, 0.99)
        self._gradients = self._engine.gradients(trained)
        vae = None
        if not features:
            vae = build_vae(recipe.vae).to(world.device).eval().requires_grad_(False)
            in_working_precision(vae, recipe.precision, world.device)
        text: Any = Text(recipe)
        groups = SequenceGroups(world, 1)
        self._task = TextToVideo(recipe, vae, text, None, Spans(), groups)

    def run(self, batch: Batch) -> None:
        self._gradients.zero()
        self._gradients.expect(last=True)
        with self._engine.forward():
            loss = self._task.loss(self._model, batch, Draws(0, 0, 0, self.world.device)).loss
        loss.backward()
        self._gradients.finish()
        norm = self._gradients.norm()
        self._gradients.scale((1.0 / (norm + 1e-6)).clamp(max=1.0))
        self._optimizer.step()
        self._ema.update(self._model)

    def recover(self) -> bool:
        """After running out of memory; whether this step can go on."""
        ready = self._engine.recover()
        self._gradients.zero()
        return ready

    def batch(self, bucket: Bucket, clips: int) -> Batch:
        device, vae = self.world.device, self.recipe.vae
        latents, pixels = None, clips
        if self._features:
            size = vae.latent_size(bucket.frames, bucket.height, bucket.width)
            mean = torch.zeros(clips, vae.latent_channels, *size, device=device)
            latents, pixels = (mean, torch.ones_like(mean)), 0
        shape = (pixels, 3, bucket.frames, bucket.height, bucket.width)
        return Batch(
            video=torch.zeros(shape, device=device),
            text=[""] * clips,
            fps=torch.full((clips,), 24.0, device=device),
            rows=np.arange(clips),
            keys=tuple(ClipKey(i, 0, bucket.frames, 1, 1) for i in range(clips)),
            decoded=(latents is None,) * clips,
            bucket=bucket,
            weight=1.0,
            degree=1,
            skipped=[],
            latents=latents,
        )


def buckets_of(recipe: TrainRecipe) -> list[Bucket]:
    """One size, the nearest to 16:9, of every resolution and length."""
    found: dict[tuple[str, int], Bucket] = {}
    for bucket in BucketTable.from_config(recipe.data).buckets:
        best = found.setdefault((bucket.resolution, bucket.frames), bucket)
        if abs(bucket.ratio - 9 / 16) < abs(best.ratio - 9 / 16):
            found[bucket.resolution, bucket.frames] = bucket
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stages = [f"opensora-1.2/stage{n}" for n in (1, 2, 3)]
    parser.add_argument("--recipes", nargs="+", default=stages)
    parser.add_argument("--small", action="store_true", help="small networks; always on a CPU")
    parser.add_argument("--features", action="store_true", help="latents from a cache")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", choices=["none", "selective", "full"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="buckets, as 480p-51f")
    parser.add_argument("--set", nargs="+", default=[], help="settings, as recompute_every=2")
    args = parser.parse_args()
    with open_world(group=True) as world:
        on_gpu = world.device.type == "cuda"
        changes = ["parallel.shard=zero2", f"compile={str(args.compile).lower()}"]
        changes += [] if on_gpu and not args.small else SMALL
        changes += [f"recompute={args.recompute}"] if args.recompute else []
        changes += args.set
        peak = bf16_tflops(torch.cuda.get_device_name()) if on_gpu else None
        ceiling = peak * 1e12 if peak else matmul_rate(world.device, torch.float32, args.repeats)
        share = "MFU" if peak else "of matrix products"
        print(f"{date.today()}, {_hardware(world.device)}, torch {torch.__version__}, ", end="")
        print(f"{ceiling / 1e12:.4g} TFLOP/s, {' '.join(changes)}, features {args.features}\n")
        print(f"| bucket | clips | s/step | tokens/s | TFLOP/s | {share} | peak memory, GB |")
        print("|---|---|---|---|---|---|---|")
        seen: set[tuple[str, int, int]] = set()
        for name in args.recipes:
            recipe = load_recipe(name, TrainRecipe, changes)
            step: Step | None = None
            for bucket in buckets_of(recipe):
                key = (bucket.resolution, bucket.frames, bucket.max_batch)
                label = f"{bucket.resolution}-{bucket.frames}f"
                if key in seen or (args.only and label not in args.only):
                    continue
                seen.add(key)
                tokens = tokens_per_clip(recipe)
                assert tokens is not None
                if not on_gpu and tokens(bucket) > SMALL_TOKENS:
                    continue
                step = step or Step(recipe, world, features=args.features)
                clips = bucket.max_batch if on_gpu else 1
                while not measure(step, bucket, clips, label, ceiling, args.repeats):
                    if not step.recover():
                        del step
                        gc.collect()
                        step = Step(recipe, world, features=args.features)
                    if clips == 1:
                        break
                    clips //= 2
            del step
            gc.collect()


def measure(
    step: Step, bucket: Bucket, clips: int, label: str, ceiling: float, repeats: int
) -> bool:
    """Print a line; whether there was memory enough. One of too little is for a single clip."""
    device, tokens = step.world.device, tokens_per_clip(step.recipe)
    assert tokens is not None
    seconds = None
    try:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        batch = step.batch(bucket, clips)
        seconds = _median_seconds(partial(step.run, batch), repeats, device)
    except torch.OutOfMemoryError:
        pass
    if seconds is None:
        if clips == 1:
            print(f"| {label} | 1 | out of memory | | | | |", flush=True)
        return False
    rate = clips * useful_flops(step.recipe)(bucket) / seconds
    memory = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(
        f"| {label} | {clips} | {seconds:.3f} | {clips * tokens(bucket) / seconds:,.0f} "
        f"| {rate / 1e12:.3g} | {rate / ceiling:.1%} | {memory / 1e9:.1f} |",
        flush=True,
    )
    return True


if __name__ == "__main__":
    main()
