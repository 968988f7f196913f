"""Which clips train together, and when: the order of every epoch.

It is a pure function of the manifest, the buckets, the cost of each bucket, the seed, the epoch
and the number of ranks. What a run has done is therefore small: how many steps of which epoch, on
how many ranks. When that number changes in mid-epoch, the rows that are left are laid out anew,
and the position becomes a list of such segments; each kept row still comes exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kinema.config.errors import ConfigError, KinemaError
from kinema.data import draws
from kinema.data.balance import lay_out
from kinema.data.buckets import (
    NOT_DRAWN,
    REASONS,
    TOO_SHORT,
    Bucket,
    BucketTable,
    Cached,
    keyed_draw,
)
from kinema.data.epoch import Epoch

Cost = Callable[[Bucket], float]
"""FLOPs that one clip of a bucket costs in a training step."""

COST_UNITS = 10**6
"""Costs are rounded to this many parts of the largest: the order must not hang on the last bit."""


Degree = Callable[[Bucket], int]
"""Ranks that share one clip of a bucket: a power of two."""

ORDER_VERSION = 2
"""Goes up when the same inputs give another order: positions saved before mean nothing then."""


class OrderMismatchError(KinemaError):
    """A saved position belongs to other data."""


class NoMicroBatchesError(KinemaError):
    """No clip of the manifest trains under the recipe."""


class ManifestLike(Protocol):
    """What is read of a manifest: its sizes, which rows are kept, its fingerprint."""

    def column(self, name: str) -> NDArray[Any]: ...
    @property
    def kept(self) -> NDArray[np.bool_]: ...
    @property
    def fingerprint(self) -> str: ...


class CachedLatents(Cached, Protocol):
    """Latents that were worked out before."""

    id: str
    """Names them: the order depends on which there are."""


@dataclass(frozen=True)
class Segment:
    """A part of an epoch on one number of ranks."""

    world_size: int
    accumulation: int
    steps: int
    """Steps done of it."""
    costs: tuple[int, ...]
    """Cost of each bucket, of `COST_UNITS`; the order depends on it."""
    degrees: tuple[int, ...]
    """Ranks that share a clip of each bucket; the order depends on it."""

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Segment:
        costs, degrees = tuple(values["costs"]), tuple(values["degrees"])
        return cls(**values | {"costs": costs, "degrees": degrees})


class SampleOrder:
    """The order of all epochs; `epoch` takes about a second per million rows.

    Args:
        manifest: sizes, kept rows and fingerprint of the clips.
        table: the buckets and their rule.
        cost: FLOPs of one clip of a bucket.
        seed: of all draws and shuffles.
        world_size: ranks.
        accumulation: micro-batches per rank and step.
        degree: ranks that share a clip of a bucket; each by itself by default.
        cached: latents to train from; clips without any have no bucket.

    Raises:
        ConfigError: `world_size` cannot be divided into groups of that many ranks.
    """

    def __init__(
        self,
        manifest: ManifestLike,
        table: BucketTable,
        cost: Cost,
        *,
        seed: int,
        world_size: int,
        accumulation: int = 1,
        degree: Degree = lambda bucket: 1,
        cached: CachedLatents | None = None,
    ) -> None:
        self.manifest = manifest
        self._cached = cached
        self.table = table
        self.seed = seed
        self.world_size = world_size
        self.accumulation = accumulation
        self._flops = np.array([cost(b) for b in table.buckets])
        if not (np.isfinite(self._flops) & (self._flops > 0)).all():
            raise ValueError("every bucket must cost something")
        units = np.rint(self._flops / self._flops.max(initial=1.0) * COST_UNITS)
        self._costs = tuple(int(u) for u in units.clip(1))
        self._degrees = tuple(degree(b) for b in table.buckets)
        assert all(d >= 1 and not d & (d - 1) for d in self._degrees), "powers of two"
        largest = max(self._degrees, default=1)  # a table may be empty
        if world_size % largest:
            raise ConfigError(
                f"{largest} ranks share a clip of some buckets, and {world_size} ranks cannot be "
                f"divided into groups of {largest}",
                where="parallel.sequence",
                hint=f"a multiple of {largest} processes, or a smaller parallel.sequence",
            )
        self._restored: tuple[int, tuple[Segment, ...]] = (-1, ())
        self._latest: Epoch | None = None

    def flops(self, bucket: Bucket) -> float:
        """FLOPs of one clip of a bucket."""
        return float(self._flops[bucket.index])

    def degree(self, bucket: Bucket) -> int:
        """Ranks that share a clip of a bucket."""
        return self._degrees[bucket.index]

    def assign(self, epoch: int) -> NDArray[np.int32]:
        """[N] bucket of every row of the manifest in an epoch, or why it has none (`REASONS`).

        Rows that a filter dropped are assigned as well; see `manifest.kept`.
        """
        frames, height, width = (
            self.manifest.column(name) for name in ("num_frames", "height", "width")
        )
        draw = keyed_draw(self.seed, epoch)
        return self.table.assign(frames, height, width, draw, cached=self._cached)

    def epoch(self, number: int) -> Epoch:
        """The order of epoch `number` (from 0); after `restore`, of what is left of that one.

        Raises:
            NoMicroBatchesError: no row has a bucket; says why.
        """
        if self._latest is None or self._latest.number != number:
            before = self._restored[1] if number == self._restored[0] else ()
            self._latest = self._lay_out(number, before)
        return self._latest

    def state(self, epoch: int, step: int) -> dict[str, Any]:
        """The position after `step` steps of `epoch(epoch)` are done, as small JSON."""
        before = self._restored[1] if epoch == self._restored[0] else ()
        now = self._segment(step)
        return {
            "version": ORDER_VERSION,
            "manifest": self.manifest.fingerprint,
            "rows": len(self.manifest.kept),
            "buckets": self._settings,
            "seed": self.seed,
            "epoch": epoch,
            "segments": [s.to_json() for s in (*before, now)],
        }

    @property
    def _settings(self) -> dict[str, Any]:
        """What decides where clips go."""
        cache = {"latent cache": self._cached.id} if self._cached else {}
        return self.table.settings | cache

    def _segment(self, steps: int) -> Segment:
        """What is laid out now, of which so many steps are done."""
        return Segment(self.world_size, self.accumulation, steps, self._costs, self._degrees)

    def restore(self, state: dict[str, Any]) -> tuple[int, int]:
        """Continue from a saved position: returns (epoch, step) to go on with.

        On the same number of ranks (with the same accumulation and costs) this is the identical
        continuation; otherwise the rows that are left of the epoch are laid out anew, each still
        exactly once. The saved seed is taken over, as the position means nothing without it.

        Raises:
            OrderMismatchError: saved with other data or other buckets; says what differs.
        """
        self._check_same_data(state)
        self.seed = int(state["seed"])
        segments = [Segment.from_json(s) for s in state["segments"]]
        number, last = int(state["epoch"]), segments[-1]
        same = self._segment(last.steps) == last
        before = tuple(s for s in (segments[:-1] if same else segments) if s.steps)
        self._restored, self._latest = (number, before), None
        if before and not len(self._left(number, before)[0]):
            return number + 1, 0
        step = last.steps if same else 0
        return (number + 1, 0) if step >= self.epoch(number).num_steps else (number, step)

    def _check_same_data(self, state: dict[str, Any]) -> None:
        hint = "the data it was saved with, or --start-from-scratch to begin its data anew"
        if state["version"] != ORDER_VERSION:
            raise OrderMismatchError(
                f"the saved position counts by version {state['version']} of the sample order, "
                f"this is version {ORDER_VERSION}",
                hint="the version of kinema it was saved with, or --start-from-scratch",
            )
        if state["manifest"] != self.manifest.fingerprint:
            rows = len(self.manifest.kept)
            same = "as many rows, with other contents" if rows == state["rows"] else f"{rows} rows"
            raise OrderMismatchError(
                f"the saved position belongs to another manifest: it had {state['rows']} rows "
                f"(fingerprint {state['manifest'][:12]}), this one has {same} "
                f"({self.manifest.fingerprint[:12]})",
                hint=hint,
            )
        differences = _differences(state["buckets"], self._settings)
        if differences:
            raise OrderMismatchError(
                "the saved position belongs to other buckets: " + "; ".join(differences), hint=hint
            )

    def _left(
        self, number: int, before: tuple[Segment, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Rows of an epoch that the segments before did not train on, and all rows' buckets."""
        bucket = self.assign(number)
        rows = np.flatnonzero((bucket >= 0) & self.manifest.kept)
        for i, segment in enumerate(before):
            done = self._arrange(number, i, rows, bucket, segment).rows_of(segment.steps)
            left = np.zeros(len(bucket), dtype=np.bool_)
            left[rows] = True
            left[done] = False
            rows = np.flatnonzero(left)
        return rows, bucket

    def _lay_out(self, number: int, before: tuple[Segment, ...]) -> Epoch:
        rows, bucket = self._left(number, before)
        if not len(rows):
            raise _nothing_to_train_on(bucket, self.manifest.kept)
        return self._arrange(number, len(before), rows, bucket, self._segment(0))

    def _arrange(
        self,
        number: int,
        part: int,
        rows: NDArray[np.int64],
        bucket: NDArray[np.int32],
        segment: Segment,
    ) -> Epoch:
        shuffled = draws.bits(draws.key(self.seed, "rows", number), rows)
        shuffled >>= np.uint64(16)  # the bucket takes the upper 16 bits
        shuffled |= bucket[rows].astype(np.uint64) << np.uint64(48)
        rows = rows[np.argsort(shuffled)]
        counts = np.bincount(bucket[rows], minlength=len(self.table.buckets)).astype(np.int64)
        layout = lay_out(
            counts,
            np.array([b.max_batch for b in self.table.buckets]),
            np.array(segment.costs),
            world_size=segment.world_size,
            accumulation=segment.accumulation,
            key=draws.key(self.seed, "steps", number, part),
            degree=np.array(segment.degrees),
        )
        first = np.cumsum(counts) - counts
        return Epoch(
            number, rows, first, layout, segment.accumulation, self.table.buckets, self._flops
        )


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two bucket settings, in words."""
    found = []
    for key in [*saved, *(k for k in now if k not in saved)]:
        if saved.get(key) != now.get(key):
            before, after = saved.get(key, "not there"), now.get(key, "not there")
            found.append(f"{key} was {before}, is {after}")
    return found


def _nothing_to_train_on(bucket: NDArray[np.int32], kept: NDArray[np.bool_]) -> KinemaError:
    """The error for a manifest of which no row has a bucket."""
    reasons = [(name, int(((bucket == code) & kept).sum())) for code, name in REASONS.items()]
    counts = [f"{count} {name}" for name, count in reasons if count]
    dropped = int((~kept).sum())
    if dropped:
        counts.append(f"{dropped} dropped by a filter before")
    hint = "kinema data explain CLIP RECIPE says for one clip what is missing"
    if (bucket[kept] == NOT_DRAWN).all() and kept.any():
        hint = "the clips fit, but no draw kept one: raise the probabilities or add clips"
    if (bucket[kept] == TOO_SHORT).all() and kept.any():
        hint = "every bucket is longer than the clips, or of images, which videos do not train as"
    return NoMicroBatchesError(
        f"no micro-batch: none of {len(bucket)} clips has a bucket ({', '.join(counts)})",
        hint=hint,
    )
