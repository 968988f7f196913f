"""Steps whose ranks finish together, without sorting the epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinema.data import draws
from kinema.data.balance import balance, lay_out
from kinema.data.epoch import Epoch
from tests.unit.data.clip_tables import generated, order_of

WINDOW = 50
"""Steps."""
TOLERANCE = 0.15
"""Total variation distance allowed between the (resolution, frames) mix of the micro-batches of
any window and of the epoch, with 8 ranks or more. Drawing batches at random gives about as much
with 8 ranks."""


@pytest.fixture(scope="module", params=[1, 2, 3])
def stage_number(request: pytest.FixtureRequest) -> int:
    return int(request.param)


CLIPS = generated(150_000)


@pytest.mark.parametrize("world_size", [8, 64, 192])
def test_published_stages_are_balanced_full_and_mixed(stage_number: int, world_size: int) -> None:
    laid = order_of(CLIPS, stage_number, world_size, seed=3).epoch(0)
    assert laid.step_balance >= 0.98
    assert laid.fill >= 0.95
    assert window_distance(laid).max() <= TOLERANCE


def test_drawing_at_random_would_not_be_balanced(stage_number: int) -> None:
    laid = order_of(CLIPS, stage_number, 64).epoch(0)
    price = cost_of_slots(laid)
    shuffled = np.random.default_rng(0).permutation(price.ravel()).reshape(price.shape)
    assert balance(shuffled) < 0.9


def test_the_epoch_is_not_sorted(stage_number: int) -> None:
    laid = order_of(CLIPS, stage_number, 64).epoch(0)
    cost = cost_of_slots(laid).mean(axis=1)
    assert abs(np.corrcoef(cost, np.arange(len(cost)))[0, 1]) < 0.1
    thirds = [part.mean() for part in np.array_split(cost, 3)]
    assert max(thirds) < 1.05 * min(thirds)


def test_steps_of_epochs_differ_and_ranks_share_every_bucket(stage_number: int) -> None:
    order = order_of(CLIPS, stage_number, 8)
    first, second = order.epoch(0), order.epoch(1)
    shape = min(first.num_steps, second.num_steps)
    same = (buckets_of_slots(first)[:shape] == buckets_of_slots(second)[:shape]).mean()
    assert same < 0.5
    means = cost_of_slots(first).mean(axis=0)
    assert means.max() < 1.02 * means.min()


def test_accumulated_micro_steps_are_balanced_each() -> None:
    laid = order_of(CLIPS, 3, 16, accumulation=4).epoch(0)
    assert laid.layout.slots.shape[0] == 4 * laid.num_steps
    assert laid.step_balance >= 0.98


@settings(max_examples=100, deadline=None)
@given(
    buckets=st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(1, 10**6)),
        min_size=1,
        max_size=12,
    ).filter(lambda found: any(rows for rows, _, _ in found)),
    world_size=st.integers(1, 20),
    accumulation=st.integers(1, 3),
)
def test_any_table_is_cut_and_laid_out_exactly(
    buckets: list[tuple[int, int, int]], world_size: int, accumulation: int
) -> None:
    rows, limit, cost = np.array(buckets, dtype=np.int64).T
    laid = lay_out(
        rows, limit, cost, world_size=world_size, accumulation=accumulation, key=draws.key(0)
    )
    assert (laid.size >= 1).all()
    assert (laid.size <= limit[laid.bucket]).all()
    covered = [
        (b, s + i)
        for b, s, n in zip(laid.bucket, laid.start, laid.size, strict=True)
        for i in range(n)
    ]
    assert sorted(covered) == [(b, i) for b, n in enumerate(rows) for i in range(n)]
    once = laid.slots[~laid.repeated]
    assert sorted(once.tolist()) == list(range(len(laid.size)))
    assert laid.slots.shape[1] == world_size
    assert laid.slots.shape[0] % accumulation == 0
    if laid.repeated.any():
        assert (laid.size == 1).all()
        assert laid.repeated.sum() < world_size * accumulation
    # No bucket is cut more often than its batch size asks, but to fill the last step.
    fewest = (-(-rows // limit)).sum()
    assert len(laid.size) - fewest < world_size * accumulation


def test_costly_micro_batches_shrink_first_to_fill_the_last_step() -> None:
    laid = lay_out(
        np.array([100, 100]), np.array([10, 50]), np.array([10, 1]),
        world_size=8, accumulation=1, key=draws.key(0),
    )  # fmt: skip
    assert np.bincount(laid.bucket).tolist() == [14, 2]
    assert np.unique(laid.size[laid.bucket == 0]).tolist() == [7, 8]


def test_repeats_are_the_cheapest() -> None:
    laid = lay_out(
        np.array([2, 2]), np.array([4, 4]), np.array([10, 1]),
        world_size=6, accumulation=1, key=draws.key(0),
    )  # fmt: skip
    assert laid.slots.shape == (1, 6)
    assert laid.bucket[laid.slots[laid.repeated]].tolist() == [1, 1]
    assert len(set(laid.slots[laid.repeated].tolist())) == 2


def cost_of_slots(laid: Epoch) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """[steps, ranks] FLOPs, through the public door."""
    return np.array(
        [
            [laid.micro_batch(step, rank).cost for rank in range(laid.world_size)]
            for step in range(laid.num_steps)
        ]
    )


def buckets_of_slots(laid: Epoch) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return laid.layout.bucket[laid.layout.slots]


def window_distance(laid: Epoch) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Of every window of steps: total variation distance of its bucket mix from the epoch's."""
    buckets = buckets_of_slots(laid)
    kind = {b: i for i, b in enumerate(np.unique(buckets))}
    names = [laid.micro_batch(*np.argwhere(buckets == b)[0]).bucket for b in kind]
    groups = {(b.resolution, b.frames) for b in names}
    group = {pair: i for i, pair in enumerate(sorted(groups))}
    lookup = np.zeros(max(kind) + 1, dtype=int)
    for b, bucket in zip(kind, names, strict=True):
        lookup[b] = group[bucket.resolution, bucket.frames]
    counts = np.zeros((laid.num_steps + 1, len(group)))
    for step, row in enumerate(lookup[buckets]):
        counts[step + 1] = counts[step] + np.bincount(row, minlength=len(group))
    window = min(WINDOW, laid.num_steps)
    mix = (counts[window:] - counts[:-window]) / (window * laid.world_size)
    return 0.5 * np.abs(mix - counts[-1] / counts[-1].sum()).sum(axis=1)


def test_micro_batches_of_equal_cost_are_joined_beside_shared_ones() -> None:
    cost = np.array([10, 1] * 4 + [20])
    rows, most = np.array([1] * 8 + [4]), np.ones(9, np.int64)
    laid = lay_out(
        rows, most, cost, world_size=2, accumulation=1, key=draws.key(0, "x"),
        degree=np.array([1] * 8 + [2]),
    )  # fmt: skip
    each = laid.size * cost[laid.bucket] / laid.degree
    assert balance(each[laid.slots]) == 1.0


def test_what_a_rank_waits_for_longest_is_cut_to_fill_a_step() -> None:
    """Not the clips that cost most in all, which four ranks share."""
    laid = lay_out(
        np.array([2, 8]), np.array([2, 4]), np.array([10, 5]), world_size=12, accumulation=1,
        key=draws.key(0, "x"), degree=np.array([4, 1]),
    )  # fmt: skip
    assert np.bincount(laid.bucket).tolist() == [1, 8]
