"""Micro-batches of equal cost side by side: how an epoch's rows are cut and laid out.

All ranks wait for the slowest, so what one step costs its ranks should be nearly equal. Cut every
bucket into as few micro-batches as its batch size allows, of even size; order them by cost; and
every run of `world_size` neighbours is a balanced step. Two things keep that from sorting the
epoch. Costs within a small tolerance count as one *level*, inside which micro-batches of all
buckets are mixed evenly; and the steps of every level are spread evenly over the epoch. The
tolerance is the widest that still reaches the target balance.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinema.data import draws

Ints = NDArray[np.int64]

TARGET_BALANCE = 0.985
"""Mean over steps of (mean cost over ranks / maximum cost over ranks) that mixing must leave."""

LEVEL_WIDTHS = (0.1, 0.08, 0.065, 0.05, 0.04, 0.03, 0.025, 0.02, 0.015, 0.01, 0.005, 0.002, 0.0)
"""How far below a level's most costly micro-batch its others may be; tried from the widest."""


@dataclass(frozen=True)
class Layout:
    """Which micro-batch each rank has when. `S` micro-steps of `W` ranks, `M` micro-batches."""

    bucket: NDArray[np.int32]
    """[M] index of the bucket."""
    start: Ints
    """[M] first row of the micro-batch, counted within its bucket's rows."""
    size: NDArray[np.int32]
    """[M] number of rows."""
    slots: NDArray[np.int32]
    """[S, W] micro-batch of every rank in every micro-step."""
    repeated: NDArray[np.bool_]
    """[S, W] True where a micro-batch stands a second time, because rows ran out."""


def lay_out(
    rows: Ints, max_batch: Ints, cost: Ints, *, world_size: int, accumulation: int, key: np.uint64
) -> Layout:
    """Cut every bucket's rows into micro-batches and give each rank one per micro-step.

    Args:
        rows: [B] rows per bucket; at least one in all.
        max_batch: [B] the most rows of one micro-batch.
        cost: [B] cost of one row, in any unit.
        world_size: ranks; each gets exactly one micro-batch in every micro-step.
        accumulation: micro-steps per step; their number is a multiple of it.
        key: of all random choices.
    """
    number, missing = _cut(rows, max_batch, cost, world_size * accumulation)
    total = int(number.sum())
    bucket = np.repeat(np.arange(len(rows), dtype=np.int32), number)
    place = np.arange(total) - np.repeat(np.cumsum(number) - number, number)
    even, larger = np.divmod(rows, np.maximum(number, 1))
    size = even[bucket] + (place < larger[bucket])
    start = place * even[bucket] + np.minimum(place, larger[bucket])
    price = size * cost[bucket]

    spread = _spread(bucket, place < larger[bucket], place, larger, number, draws.bits(key, 1))
    by_cost = np.unique(-price, return_inverse=True)
    slots, levels = _choose_levels(-by_cost[0], by_cost[1], spread, price, world_size, missing)
    slots = slots[_interleave(levels, draws.bits(key, 2))]
    repeated = slots >= total
    slots = np.where(repeated, slots - total, slots)
    ranks = np.argsort(draws.bits(key ^ np.uint64(3), np.arange(slots.size)).reshape(slots.shape))
    return Layout(
        bucket=bucket,
        start=start,
        size=size.astype(np.int32),
        slots=np.take_along_axis(slots, ranks, axis=1).astype(np.int32),
        repeated=np.take_along_axis(repeated, ranks, axis=1),
    )


def balance(cost: NDArray[np.floating] | Ints) -> float:
    """Mean over steps of (mean over ranks / maximum over ranks) of costs [steps, ranks]."""
    return float((cost.mean(axis=1) / cost.max(axis=1)).mean())


def _cut(rows: Ints, max_batch: Ints, cost: Ints, multiple: int) -> tuple[Ints, int]:
    """[B] micro-batches per bucket, adding up to a multiple; and how many are still missing.

    To fill the last step some micro-batches are made smaller than they could be: the costliest,
    as they are what others wait for. Only when every row is alone in its micro-batch can some be
    missing.
    """
    number = -(-rows // max_batch)
    missing = int(-number.sum() % multiple)
    costliest = [
        (-int(-(-rows[b] // number[b]) * cost[b]), int(b)) for b in np.flatnonzero(rows > number)
    ]
    heapq.heapify(costliest)
    while missing and costliest:
        _, b = heapq.heappop(costliest)
        number[b] += 1
        missing -= 1
        if rows[b] > number[b]:
            heapq.heappush(costliest, (-int(-(-rows[b] // number[b]) * cost[b]), b))
    return number, missing


def _spread(
    bucket: NDArray[np.int32],
    is_larger: NDArray[np.bool_],
    place: Ints,
    larger: Ints,
    number: Ints,
    key: NDArray[np.uint64],
) -> NDArray[np.float64]:
    """[M] position in [0, 1) of each micro-batch among its equals, evenly spaced with jitter."""
    among = np.where(is_larger, place, place - larger[bucket])
    equals = np.where(is_larger, larger[bucket], number[bucket] - larger[bucket])
    jitter = draws.uniform(key[0], np.arange(len(bucket)))
    return (among + jitter) / equals


def _choose_levels(
    costs: Ints,
    cost_of: Ints,
    spread: NDArray[np.float64],
    price: Ints,
    world_size: int,
    missing: int,
) -> tuple[Ints, Ints]:
    """Steps in order of their level, for the widest levels that reach the target balance.

    Args:
        costs: the different costs of micro-batches, descending.
        cost_of: [M] index into `costs`.
        missing: how many of the cheapest micro-batches stand a second time.

    Returns:
        [S, W] micro-batch of every slot (plus M where it is a repeat); [S] level of the step.
    """
    best: tuple[float, Ints, Ints] | None = None
    for width in LEVEL_WIDTHS:
        level = _levels(costs, width)[cost_of]
        order = np.argsort(level + spread, kind="stable")
        cheapest = order[::-1][np.arange(missing) % len(order)]
        slots = np.concatenate([order, cheapest + len(order)]).reshape(-1, world_size)
        first = slots[:, 0] % len(order)
        reached = balance(price[slots % len(order)])
        if best is None or reached > best[0]:
            best = (reached, slots, level[first])
        if reached >= TARGET_BALANCE:
            break
    assert best is not None
    return best[1], best[2]


def _levels(costs: Ints, width: float) -> Ints:
    """The level of each of the descending `costs`."""
    level = np.zeros(len(costs), dtype=np.int64)
    start = 0
    while start < len(costs):
        # costs descend, so what is left of the first one below the level's floor belongs to it
        end = int(np.searchsorted(-costs, -(1 - width) * costs[start], side="right"))
        end = max(end, start + 1)
        level[start:end] = level[start - 1] + 1 if start else 0
        start = end
    return level


def _interleave(levels: Ints, key: NDArray[np.uint64]) -> Ints:
    """An order of the steps in which every level's are evenly spaced, from a random beginning."""
    _, level, count = np.unique(levels, return_inverse=True, return_counts=True)
    place = np.empty(len(levels))
    order = np.argsort(level, kind="stable")
    place[order] = np.arange(len(levels)) - np.repeat(np.cumsum(count) - count, count)
    phase = draws.uniform(key[0], np.arange(len(count)))
    return np.argsort((place + phase[level]) / count[level], kind="stable")
