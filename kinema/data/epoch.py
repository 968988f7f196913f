"""The order of one epoch: which rows each rank works on in each step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinema.data.balance import Layout, balance
from kinema.data.buckets import Bucket


@dataclass(frozen=True)
class MicroBatch:
    """The clips that one rank works on at once."""

    bucket: Bucket
    rows: NDArray[np.int64]
    """Rows of the manifest, 1 to `bucket.max_batch` of them."""
    cost: float
    """FLOPs of each rank that works on it: rows times the bucket's cost per clip, over degree."""
    weight: float = 1.0
    """What its loss counts for, so that all micro-batches of a step weigh the same when each rank's
    part of the gradient is averaged over ranks and accumulation. 1 where every rank has a
    micro-batch of its own. When fewer rows are left than there are ranks, some micro-batches stand
    a second time with weight 0, and the others make up for them."""
    degree: int = 1
    """Ranks that share it: those whose number over `degree` is the same whole number."""

    @property
    def repeated(self) -> bool:
        return self.weight == 0


class Epoch:
    """The order of one epoch, or of what is left of it after the number of ranks changed."""

    def __init__(
        self,
        number: int,
        rows: NDArray[np.int64],
        first: NDArray[np.int64],
        layout: Layout,
        accumulation: int,
        buckets: list[Bucket],
        flops: NDArray[np.float64],
    ) -> None:
        """Made by `SampleOrder.epoch`.

        Args:
            rows: [N] rows of the manifest, those of a bucket together, shuffled.
            first: [B] where in `rows` each bucket begins.
            flops: [B] FLOPs of one clip.
        """
        self.number = number
        self.layout = layout
        self.accumulation = accumulation
        self.num_steps = len(layout.slots) // accumulation
        self.num_rows = len(rows)
        self.world_size = layout.slots.shape[1]
        self._rows = rows
        self._start = first[layout.bucket] + layout.start
        self._buckets = buckets
        self._flops = flops
        self._slots = layout.slots.reshape(self.num_steps, accumulation, -1)
        self._repeated = layout.repeated.reshape(self._slots.shape)
        self._shared = bool((layout.degree > 1).any())
        self.num_repeated = self._counted(layout.slots[layout.repeated])
        """Micro-batches that stand a second time, because there are fewer rows than ranks."""

    def micro_batch(self, step: int, rank: int, micro: int = 0) -> MicroBatch:
        """What `rank` works on in `step` (from 0), in the `micro`-th of its accumulated batches."""
        index = int(self._slots[step, micro, rank])
        bucket = int(self.layout.bucket[index])
        start, size = int(self._start[index]), int(self.layout.size[index])
        degree = int(self.layout.degree[index])
        weight = 1.0
        if self.num_repeated or self._shared:
            repeated, slots = self._repeated[step], self._slots[step]
            of_step = slots.size / self._counted(slots[~repeated])
            weight = 0.0 if repeated[micro, rank] else of_step
        return MicroBatch(
            bucket=self._buckets[bucket],
            rows=self._rows[start : start + size],
            cost=size * float(self._flops[bucket]) / degree,
            weight=weight,
            degree=degree,
        )

    def _counted(self, slots: NDArray[np.int32]) -> int:
        """How many micro-batches the ranks' places are, shared ones counted once."""
        if not self._shared:
            return int(slots.size)
        return round(float((1.0 / self.layout.degree[slots]).sum()))

    @property
    def num_micro_batches(self) -> int:
        """Those of all steps, repeats counted, shared ones once."""
        return self._counted(self.layout.slots)

    def micro_batches_of(self, buckets: int) -> NDArray[np.int64]:
        """[buckets] the same by bucket."""
        layout, slots = self.layout, self.layout.slots.ravel()
        each = np.bincount(layout.bucket[slots], 1.0 / layout.degree[slots], minlength=buckets)
        return np.rint(each).astype(np.int64)

    def flops_of(self, buckets: int) -> NDArray[np.float64]:
        """[buckets] FLOPs of an epoch by bucket, repeats counted."""
        layout, slots = self.layout, self.layout.slots.ravel()
        each = np.bincount(layout.bucket[slots], self._price()[slots], minlength=buckets)
        return each.astype(np.float64)

    def _price(self) -> NDArray[np.float64]:
        """[M] FLOPs of each rank of a micro-batch."""
        layout = self.layout
        price: NDArray[np.float64] = layout.size * self._flops[layout.bucket] / layout.degree
        return price

    @property
    def step_balance(self) -> float:
        """Mean over steps of mean over maximum cost of the ranks; each micro-step counts."""
        return balance(self._price()[self.layout.slots])

    @property
    def fill(self) -> float:
        """Mean over micro-batches of their rows over the most that they may hold."""
        limit = np.array([b.max_batch for b in self._buckets])
        return float((self.layout.size / limit[self.layout.bucket]).mean())

    @property
    def flops(self) -> float:
        """FLOPs of the epoch, repeats counted."""
        return float(self._price()[self.layout.slots].sum())

    def rows_of(self, steps: int) -> NDArray[np.int64]:
        """The rows that the first `steps` steps train on."""
        seen = np.unique(self._slots[:steps][~self._repeated[:steps]])
        size = self.layout.size[seen].astype(np.int64)
        offset = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
        return self._rows[np.repeat(self._start[seen], size) + offset]
