"""From a table of clips to an epoch's order: `python benchmarks/bucketing.py [--rows 1000000]`.

Prints one markdown table. Times are the best of three, in seconds of wall clock, on one thread:
*buckets* draws the random numbers and applies the bucket rule to every row; *order* is what
follows for 64 ranks (shuffle, cut into micro-batches, balance the steps).
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np

from kinema.config.recipe import load_recipe
from kinema.data.buckets import BucketTable, keyed_draw
from kinema.data.like import openvid_like
from kinema.data.order import SampleOrder
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost


class Clips:
    """Columns in memory, as `SampleOrder` reads them."""

    def __init__(self, rows: int) -> None:
        frames, height, width = openvid_like(rows, images=0.2)
        self.columns = {"num_frames": frames, "height": height, "width": width}
        self.kept = np.ones(rows, dtype=np.bool_)
        self.fingerprint = "generated"

    def column(self, name: str) -> np.ndarray[Any, Any]:
        return self.columns[name]


def best(call: Callable[[], object], times: int = 3) -> float:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--world-size", type=int, default=64)
    args = parser.parse_args()
    clips = Clips(args.rows)
    print(f"{date.today()}, {platform.machine()}, {args.rows:,} rows, {args.world_size} ranks\n")
    print("| recipe | rows kept | buckets, s | order, s | steps | peak memory, GB |")
    print("|---|---|---|---|---|---|")
    for number in (1, 2, 3):
        name = f"opensora-1.2/stage{number}"
        recipe = load_recipe(name, TrainRecipe)
        table, cost = BucketTable.from_config(recipe.data), bucket_cost(recipe)
        sizes = clips.columns.values()
        buckets = best(lambda table=table, sizes=sizes: table.assign(*sizes, keyed_draw(0, 0)))

        def order(table: BucketTable = table, cost: Any = cost) -> Any:
            made = SampleOrder(clips, table, cost, seed=0, world_size=args.world_size)
            return made.epoch(0)

        whole = best(order)
        laid = order()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(
            f"| {name} | {laid.num_rows:,} | {buckets:.2f} | {whole - buckets:.2f} "
            f"| {laid.num_steps:,} | {peak:.2f} |"
        )


if __name__ == "__main__":
    main()
