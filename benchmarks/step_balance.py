"""How long ranks wait for each other: `python benchmarks/step_balance.py [--rows 1000000]`.

Prints one markdown table, which depends on no clock. *At random* gives every rank any full batch,
as the original sampler does; *ours* is the order that training uses. The balance is the mean over
steps of (mean cost over ranks / maximum cost over ranks), with all work of a step as cost: the
transformer with recomputation, the autoencoder's encoding, the text encoder. *Window* is the total
variation distance between the (resolution, frames) mix of any 50 steps and of the epoch: mean and
largest. *Mixed* is how many such buckets one step has on average, of how many.
"""

from __future__ import annotations

import argparse
from datetime import date
from typing import Any

import numpy as np
from bucketing import Clips
from numpy.typing import NDArray

from kinema.config.recipe import load_recipe
from kinema.data.balance import balance
from kinema.data.buckets import BucketTable
from kinema.data.epoch import Epoch
from kinema.data.order import SampleOrder
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost

WINDOW = 50


def at_random(order: SampleOrder, laid: Epoch, world_size: int) -> float:
    """Balance of full batches in random order: what is left of a bucket is dropped."""
    buckets = order.table.buckets
    rows = np.bincount(laid.layout.bucket, weights=laid.layout.size, minlength=len(buckets))
    limit = np.array([b.max_batch for b in buckets])
    price = limit * np.array([order.flops(b) for b in buckets])
    batches = np.repeat(price, (rows // limit).astype(int))
    np.random.default_rng(0).shuffle(batches)
    return balance(batches[: len(batches) // world_size * world_size].reshape(-1, world_size))


def mixes(order: SampleOrder, laid: Epoch) -> NDArray[np.float64]:
    """[steps, (resolution, frames)] micro-batches."""
    names = [(b.resolution, b.frames) for b in order.table.buckets]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    group = np.array([place[n] for n in names])[laid.layout.bucket[laid.layout.slots]]
    group = group.reshape(laid.num_steps, -1)
    counts = np.zeros((laid.num_steps, len(place)))
    np.add.at(counts, (np.arange(len(group))[:, None], group), 1)
    return counts[:, counts.any(axis=0)]


def window_distance(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    whole = counts.sum(axis=0) / counts.sum()
    running = np.vstack([np.zeros(counts.shape[1]), counts.cumsum(axis=0)])
    window = min(WINDOW, len(counts))
    part = running[window:] - running[:-window]
    return 0.5 * np.abs(part / part.sum(axis=1, keepdims=True) - whole).sum(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--world-size", type=int, nargs="+", default=[8, 64, 192])
    args = parser.parse_args()
    clips: Any = Clips(args.rows)
    print(f"{date.today()}, {args.rows:,} rows\n")
    print("| recipe | ranks | steps | at random | ours | full | window | mixed |")
    print("|---|---|---|---|---|---|---|---|")
    for number in (1, 2, 3):
        name = f"opensora-1.2/stage{number}"
        recipe = load_recipe(name, TrainRecipe)
        table, cost = BucketTable.from_config(recipe.data), bucket_cost(recipe)
        for ranks in args.world_size:
            order = SampleOrder(clips, table, cost, seed=0, world_size=ranks)
            laid = order.epoch(0)
            counts = mixes(order, laid)
            distance = window_distance(counts)
            print(
                f"| {name} | {ranks} | {laid.num_steps:,} | {at_random(order, laid, ranks):.3f} "
                f"| {laid.step_balance:.3f} | {laid.fill:.1%} "
                f"| {distance.mean():.3f}, {distance.max():.3f} "
                f"| {(counts > 0).sum(axis=1).mean():.1f} of {counts.shape[1]} |"
            )


if __name__ == "__main__":
    main()
