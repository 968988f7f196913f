"""Micro-batches of equal cost side by side: how an epoch's rows are cut and laid out.

All ranks wait for the slowest, so what one step costs its ranks should be nearly equal. Cut every
bucket into as few micro-batches as its batch size allows, of even size; order them by cost; and
every run of `world_size` neighbours is a balanced step. Two things keep that from sorting the
epoch. Costs within a small tolerance count as one *level*, inside which micro-batches of all
buckets are mixed evenly; and the steps of every level are spread evenly over the epoch. The
tolerance is the widest that still reaches the target balance.

Where several ranks share a micro-batch (sequence parallelism; its *degree* is a power of two),
smaller ones are first joined with their neighbours in cost into *units* of as many ranks as the
largest degree, and units take the place of micro-batches.
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
    degree: NDArray[np.int32]
    """[M] ranks that share it: neighbours, the first of which is a multiple of the degree."""
    slots: NDArray[np.int32]
    """[S, W] micro-batch of every rank in every micro-step."""
    repeated: NDArray[np.bool_]
    """[S, W] True where a micro-batch stands a second time, because rows ran out."""


def lay_out(
    rows: Ints,
    max_batch: Ints,
    cost: Ints,
    *,
    world_size: int,
    accumulation: int,
    key: np.uint64,
    degree: Ints | None = None,
) -> Layout:
    """Cut every bucket's rows into micro-batches and give each rank one per micro-step.

    Args:
        rows: [B] rows per bucket; at least one in all.
        max_batch: [B] the most rows of one micro-batch.
        cost: [B] cost of one row, in any unit.
        world_size: ranks; each gets exactly one micro-batch in every micro-step.
        accumulation: micro-steps per step; their number is a multiple of it.
        key: of all random choices.
        degree: [B] ranks that share a micro-batch, powers of two that divide `world_size`; 1 by
            default.
    """
    degree = np.ones_like(rows) if degree is None else degree
    largest = int(degree.max())
    number, missing = _cut(rows, max_batch, cost, degree, world_size * accumulation)
    total = int(number.sum())
    bucket = np.repeat(np.arange(len(rows), dtype=np.int32), number)
    place = np.arange(total) - np.repeat(np.cumsum(number) - number, number)
    even, larger = np.divmod(rows, np.maximum(number, 1))
    size = even[bucket] + (place < larger[bucket])
    start = place * even[bucket] + np.minimum(place, larger[bucket])
    # What each of its ranks has to do, in whole numbers.
    price = size * (cost * (largest // degree))[bucket]

    spread = _spread(bucket, place < larger[bucket], place, larger, number, draws.bits(key, 1))
    units = _units(price, spread, degree[bucket], largest, missing)
    slots, levels = _choose_levels(units, price, world_size // largest)
    slots = slots[_interleave(levels, draws.bits(key, 2))]
    repeated = slots >= total
    slots = np.where(repeated, slots - total, slots)
    # Units change places among one another; ranks that share a micro-batch stay together.
    steps, places = slots.shape[:2]
    random = draws.bits(key ^ np.uint64(3), np.arange(steps * places)).reshape(steps, places, 1)
    order = np.argsort(random, axis=1)
    return Layout(
        bucket=bucket,
        start=start,
        size=size.astype(np.int32),
        degree=degree[bucket].astype(np.int32),
        slots=np.take_along_axis(slots, order, axis=1).reshape(steps, -1).astype(np.int32),
        repeated=np.take_along_axis(repeated, order, axis=1).reshape(steps, -1),
    )


def balance(cost: NDArray[np.floating] | Ints) -> float:
    """Mean over steps of (mean over ranks / maximum over ranks) of costs [steps, ranks]."""
    return float((cost.mean(axis=1) / cost.max(axis=1)).mean())


def _cut(rows: Ints, max_batch: Ints, cost: Ints, degree: Ints, multiple: int) -> tuple[Ints, int]:
    """[B] micro-batches per bucket, whose ranks add up to a multiple; and how many ranks' places
    are still empty.

    To fill the last step some micro-batches are made smaller than they could be: the costliest,
    as they are what others wait for. Places stay empty only when every row that could fill them is
    alone in its micro-batch.
    """
    number = -(-rows // max_batch)
    missing = int(-(number * degree).sum() % multiple)

    def entry(b: int) -> tuple[float, int]:
        return -float(-(-rows[b] // number[b]) * cost[b] / degree[b]), b

    costliest = [entry(int(b)) for b in np.flatnonzero(rows > number)]
    heapq.heapify(costliest)
    while missing and costliest:
        _, b = heapq.heappop(costliest)
        if degree[b] > missing:  # and so it stays: what is missing only falls
            continue
        number[b] += 1
        missing -= int(degree[b])
        if rows[b] > number[b]:
            heapq.heappush(costliest, entry(b))
    return number, missing


@dataclass(frozen=True)
class _Units:
    """Groups of `R` neighbouring ranks and what they do at once."""

    members: Ints
    """[U, R] micro-batch of each rank (plus M where it is a repeat)."""
    price: Ints
    """[U] cost of the costliest."""
    spread: NDArray[np.float64]
    """[U] where among its equals."""
    repeats: Ints
    """[E, R] units that stand a second time; they fill up the last step."""


def _units(
    price: Ints, spread: NDArray[np.float64], degree: Ints, largest: int, missing: int
) -> _Units:
    """Join micro-batches of smaller degrees into units of the largest one.

    Args:
        price: [M] what each rank of a micro-batch has to do.
        spread: [M] see `_spread`.
        degree: [M] ranks that share it.
        largest: ranks of a unit.
        missing: ranks' places that repeats of the cheapest micro-batches fill.
    """
    smallest = int(degree.min())
    members = np.flatnonzero(degree == smallest)[:, None].repeat(smallest, axis=1)
    of_unit, among = price[members[:, 0]], spread[members[:, 0]]
    cheapest = np.arange(missing // smallest) % len(members)
    if missing:
        cheapest = np.lexsort((-among, of_unit))[cheapest]
    repeats = members[cheapest] + len(price)
    if smallest < largest:  # repeats are joined like all others
        members = np.concatenate([members, repeats])
        of_unit, among = (np.concatenate([v, v[cheapest]]) for v in (of_unit, among))
        repeats = repeats[:0].reshape(0, smallest)
    ranks = smallest
    while ranks < largest:
        # Their number is even: all ranks add up to a multiple of the world, and larger degrees are
        # multiples of two of these.
        order = np.lexsort((among, -of_unit))
        members = members[order].reshape(-1, 2 * ranks)
        of_unit, among = of_unit[order][::2], among[order][::2]
        ranks *= 2
        own = np.flatnonzero(degree == ranks)
        members = np.concatenate([members, own[:, None].repeat(ranks, axis=1)])
        of_unit = np.concatenate([of_unit, price[own]])
        among = np.concatenate([among, spread[own]])
        repeats = repeats.reshape(0, ranks)
    return _Units(members, of_unit, among, repeats)


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


def _choose_levels(units: _Units, price: Ints, units_per_step: int) -> tuple[Ints, Ints]:
    """Steps in order of their level, for the widest levels that reach the target balance.

    Args:
        units: what is laid out.
        price: [M] what each rank of a micro-batch has to do.
        units_per_step: ranks of the world over ranks of a unit.

    Returns:
        [S, units_per_step, R] micro-batch of every rank (plus M where it is a repeat); [S] level of
        the step.
    """
    costs, cost_of = np.unique(-units.price, return_inverse=True)
    count = len(units.price)
    # Rank by rank what each unit costs, for the balance.
    of_member = price[units.members % len(price)]
    extra = price[units.repeats % len(price)]
    of_member = np.concatenate([of_member, extra])
    members = np.concatenate([units.members, units.repeats])
    best: tuple[float, Ints, Ints] | None = None
    for width in LEVEL_WIDTHS:
        level = _levels(-costs, width)[cost_of]
        order = np.argsort(level + units.spread, kind="stable")
        slots = np.concatenate([order, np.arange(count, len(members))]).reshape(-1, units_per_step)
        reached = balance(of_member[slots].reshape(len(slots), -1))
        if best is None or reached > best[0]:
            best = (reached, slots, level[slots[:, 0] % count])
        if reached >= TARGET_BALANCE:
            break
    assert best is not None
    return members[best[1]], best[2]


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
