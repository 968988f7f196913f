"""When encoding latents ahead of training pays: `python benchmarks/latent_cache.py`.

Prints one markdown table, which depends on no clock: for a million generated clips, FLOPs that
encoding takes in every epoch, FLOPs and disk to do it once (each clip at every size its recipe may
draw), after how many epochs that is less, and GPU hours at a stated rate.
"""

from __future__ import annotations

import argparse
from datetime import date

import numpy as np

from kinema.config.recipe import load_recipe
from kinema.data.buckets import BucketTable
from kinema.data.like import openvid_like
from kinema.data.manifest import Manifest
from kinema.data.order import SampleOrder
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost
from kinema.training.encode_latents import wanted_clips

RECIPES = ("opensora-1.0/16x256x256", "opensora-1.0/64x512x512", "opensora-1.2/stage1",
           "opensora-1.2/stage2", "opensora-1.2/stage3")  # fmt: skip
BYTES = 2 * 2
"""Mean and standard deviation in float16."""


def clips(rows: int) -> Manifest:
    frames, height, width = openvid_like(rows, images=0.2)
    names = [f"{i}.mp4" for i in range(rows)]
    columns = {"path": names, "text": names, "num_frames": frames, "height": height}
    return Manifest.from_columns(columns | {"width": width, "fps": np.full(rows, 24.0)}, ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tflops", type=float, default=300.0, help="sustained, of one GPU")
    args = parser.parse_args()
    manifest = clips(args.rows)
    print(f"{date.today()}, {args.rows:,} clips, GPU hours at {args.tflops:g} TFLOP/s\n")
    print(
        "| recipe | encoding, of a step | GPU h per epoch | once, GPU h | disk, TB | pays after |"
    )
    print("|---|---|---|---|---|---|")
    for name in RECIPES:
        recipe = load_recipe(name, TrainRecipe)
        table, cost = BucketTable.from_config(recipe.data), bucket_cost(recipe)
        laid = SampleOrder(manifest, table, cost, seed=0, world_size=64).epoch(0)
        encode = np.array([recipe.vae.encode_flops(b.frames, b.height, b.width)
                           for b in table.buckets])  # fmt: skip
        samples = np.bincount(laid.layout.bucket, laid.layout.size, minlength=len(encode))
        of_epoch = float((samples * encode).sum())
        shapes, counts = np.unique(
            [(c.frames, c.height, c.width) for c in wanted_clips(recipe, manifest)],
            axis=0,
            return_counts=True,
        )
        once = nbytes = 0.0
        for (frames, height, width), count in zip(shapes.tolist(), counts.tolist(), strict=True):
            once += count * recipe.vae.encode_flops(frames, height, width)
            size = recipe.vae.latent_size(frames, height, width)
            nbytes += count * BYTES * recipe.vae.latent_channels * np.prod(size)
        hour = args.tflops * 1e12 * 3600
        print(
            f"| {name} | {of_epoch / laid.flops:.1%} | {of_epoch / hour:,.0f} | {once / hour:,.0f} "
            f"| {nbytes / 1e12:.2f} | {once / of_epoch:.1f} epochs |"
        )


if __name__ == "__main__":
    main()
