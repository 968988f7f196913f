"""Which clips train together, and when: the order of an epoch, a pure function of its inputs.

(Signatures; the filling follows.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.data.buckets import Bucket, BucketTable

Cost = Callable[[Bucket], float]
"""FLOPs that one clip of a bucket costs in a training step."""


class OrderMismatchError(KinemaError):
    """The saved position belongs to other data: what differs, and the way out."""


@dataclass(frozen=True)
class MicroBatch:
    """The clips that one rank works on at once."""

    bucket: Bucket
    rows: NDArray[np.int64]
    """Rows of the manifest, 1 to `bucket.max_batch` of them."""
    cost: float
    """FLOPs: rows times the bucket's cost per clip."""


@dataclass(frozen=True)
class ClipSizes:
    """What the rule needs to know of each clip: columns of the manifest, [N] each."""

    num_frames: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    dropped_by: NDArray[Any] | None
    """[N] strings: the filter that took the row; empty where none did."""
    fingerprint: str
    """Of the manifest: a saved position is refused for another one."""


class Epoch:
    """The order of one epoch (or of what is left of it after the number of ranks changed)."""

    number: int
    num_steps: int

    def micro_batch(self, step: int, rank: int, micro: int = 0) -> MicroBatch:
        """What `rank` works on in `step` (from 0), in the `micro`-th of its accumulated batches."""
        raise NotImplementedError


class SampleOrder:
    """The order of all epochs; `epoch(e)` computes one (a second per million rows)."""

    def __init__(
        self,
        clips: ClipSizes,
        table: BucketTable,
        cost: Cost,
        *,
        seed: int,
        world_size: int,
        accumulation: int = 1,
    ) -> None:
        raise NotImplementedError

    def epoch(self, number: int) -> Epoch:
        """The order of epoch `number` (from 0); after `restore`, of what is left of that one."""
        raise NotImplementedError

    def state(self, epoch: int, step: int) -> dict[str, Any]:
        """The position after `step` steps of `epoch(epoch)` are done, as small JSON."""
        raise NotImplementedError

    def restore(self, state: dict[str, Any]) -> tuple[int, int]:
        """Continue from a saved position: returns (epoch, step) to go on with.

        On the same number of ranks (and accumulation) this is the identical continuation; on
        another, the rows that are left of the epoch are ordered anew, each still exactly once.

        Raises:
            OrderMismatchError: saved with other data or other buckets.
        """
        raise NotImplementedError
