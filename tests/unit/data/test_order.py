"""The order of an epoch: exactly once, never silent, the same again, and resumed anywhere."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kinema.config.errors import ConfigError
from kinema.data.buckets import BucketTable
from kinema.data.epoch import Epoch
from kinema.data.manifest import Manifest
from kinema.data.order import NoMicroBatchesError, OrderMismatchError, SampleOrder
from tests.unit.data.clip_tables import generated, manifest, order_of

SMALL = {"64x64": {1: (1.0, 5), 8: ((0.9, 0.6), 3), 16: (0.8, 1)}, "32x32": {1: (1.0, 7)}}


def small_clips(count: int, seed: int = 0) -> Manifest:
    random = np.random.default_rng(seed)
    side = random.choice([32, 64, 128], count)
    return manifest(random.choice([1, 9, 20], count), side, side)


def small_order(
    clips: Manifest,
    world_size: int,
    accumulation: int = 1,
    seed: int = 0,
    degrees: dict[int, int] | None = None,
) -> Any:
    """Args:
    degrees: frames: ranks that share a clip.
    """
    return SampleOrder(
        clips,
        BucketTable(SMALL),
        lambda b: float(b.frames * b.height * b.width),
        seed=seed,
        world_size=world_size,
        accumulation=accumulation,
        degree=lambda b: (degrees or {}).get(b.frames, 1),
    )


def trained(laid: Epoch, first: int = 0, last: int | None = None) -> list[int]:
    """Rows that count in the loss, of steps first to last - 1, by asking for every micro-batch."""
    rows: list[int] = []
    for step in range(first, laid.num_steps if last is None else last):
        for rank in range(laid.world_size):
            for micro in range(laid.accumulation):
                batch = laid.micro_batch(step, rank, micro)
                assert 1 <= len(batch.rows) <= batch.bucket.max_batch
                if not batch.repeated and rank % batch.degree == 0:
                    rows += batch.rows.tolist()
    return rows


def kept(order: SampleOrder, epoch: int) -> NDArray[np.int64]:
    return np.flatnonzero((order.assign(epoch) >= 0) & order.manifest.kept)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 120),
    world_size=st.integers(1, 9),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_kept_row_exactly_once(
    count: int, world_size: int, accumulation: int, seed: int
) -> None:
    order = small_order(small_clips(count, seed), world_size, accumulation, seed)
    rows = kept(order, 0)
    if not len(rows):
        with pytest.raises(NoMicroBatchesError):
            order.epoch(0)
        return
    laid = order.epoch(0)
    assert sorted(trained(laid)) == rows.tolist()
    assert laid.num_steps * world_size * accumulation == laid.num_micro_batches
    assert laid.num_repeated < world_size * accumulation


DEGREES = [{16: 2}, {8: 2, 16: 4}, {1: 2, 8: 2, 16: 4}, {1: 4, 8: 4, 16: 4}]


@settings(max_examples=80, deadline=None)
@given(
    count=st.integers(1, 120),
    groups=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
    degrees=st.sampled_from(DEGREES),
)
def test_ranks_that_share_a_clip(
    count: int, groups: int, accumulation: int, seed: int, degrees: dict[int, int]
) -> None:
    clips, world_size = small_clips(count, seed), groups * max(degrees.values())
    order = small_order(clips, world_size, accumulation, seed, degrees)
    rows = kept(order, 0)
    if not len(rows):
        return
    laid = order.epoch(0)
    assert sorted(trained(laid)) == rows.tolist()
    assert laid.num_micro_batches == laid.micro_batches_of(len(order.table.buckets)).sum()
    for step in range(laid.num_steps):
        share: defaultdict[tuple[int, ...], float] = defaultdict(float)
        for micro in range(accumulation):
            for rank in range(world_size):
                batch = laid.micro_batch(step, rank, micro)
                assert batch.degree == degrees.get(batch.bucket.frames, 1)
                first = laid.micro_batch(step, rank // batch.degree * batch.degree, micro)
                assert first.rows.tolist() == batch.rows.tolist()
                assert first.weight == batch.weight
                cost = len(batch.rows) * order.flops(batch.bucket) / batch.degree
                assert batch.cost == pytest.approx(cost)
                # Each rank's gradient is of its tokens: a part of 1 / degree, here.
                part = batch.weight / batch.degree / (world_size * accumulation)
                share[tuple(batch.rows.tolist())] += part
        counted = [value for value in share.values() if value]
        assert counted == pytest.approx([1 / len(counted)] * len(counted))


def test_sharing_keeps_steps_balanced_and_resumes_on_other_ranks() -> None:
    clips = generated(20_000)

    def order_on(world_size: int, most: int) -> SampleOrder:
        return order_of(clips, 3, world_size, degree=lambda b: min(most, 1 + 3 * (b.frames > 60)))

    order = order_on(16, 4)
    laid = order.epoch(0)
    assert {1, 4} == set(np.unique(laid.layout.degree))
    assert laid.step_balance > 0.97
    done = laid.rows_of(laid.num_steps // 2).tolist()
    state = saved(order, 0, laid.num_steps // 2)
    for world_size, most in ((6, 1), (16, 1), (8, 4)):
        fresh = order_on(world_size, most)
        assert fresh.restore(state) == (0, 0)
        assert sorted(done + trained(fresh.epoch(0))) == kept(order, 0).tolist()
    again = order_on(16, 4)
    assert again.restore(state) == (0, laid.num_steps // 2)


def test_ranks_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 ranks cannot be divided into groups of 4"):
        small_order(small_clips(40), 6, degrees={16: 4})


def test_rows_are_of_their_bucket() -> None:
    clips = generated(4000)
    order = order_of(clips, 3, 8)
    assigned = order.assign(0)
    laid = order.epoch(0)
    for step in range(0, laid.num_steps, 7):
        for rank in range(8):
            batch = laid.micro_batch(step, rank)
            assert (assigned[batch.rows] == batch.bucket.index).all()
            assert batch.cost == pytest.approx(len(batch.rows) * order.flops(batch.bucket))


def test_rows_of_is_what_the_micro_batches_hold() -> None:
    laid = small_order(small_clips(90), 4, 2).epoch(0)
    for steps in range(laid.num_steps + 1):
        assert sorted(laid.rows_of(steps).tolist()) == sorted(trained(laid, 0, steps))


def test_dropped_rows_do_not_train() -> None:
    clips = small_clips(50).with_dropped({3: "blur", 4: "blur", 40: "text"})
    order = small_order(clips, 2)
    assert not {3, 4, 40} & set(trained(order.epoch(0)))
    assert sorted(trained(order.epoch(0))) == kept(order, 0).tolist()


def test_same_inputs_same_order_and_epochs_differ() -> None:
    clips = generated(2000)
    first, again = order_of(clips, 1, 4).epoch(2), order_of(clips, 1, 4).epoch(2)
    assert trained(first) == trained(again)
    order = order_of(clips, 1, 4)
    assert trained(order.epoch(3)) != trained(first)
    assert trained(order_of(clips, 1, 4, seed=1).epoch(2)) != trained(first)
    assert order.epoch(2).num_rows == first.num_rows


def test_fewer_rows_than_ranks_repeat_with_weight_zero() -> None:
    order = small_order(small_clips(3), world_size=8)
    laid = order.epoch(0)
    batches = [laid.micro_batch(0, rank) for rank in range(8)]
    assert laid.num_steps == 1
    assert sorted(trained(laid)) == kept(order, 0).tolist()
    assert laid.num_repeated == 8 - len(kept(order, 0))
    assert sum(b.weight for b in batches) == pytest.approx(8)
    assert all(b.weight == 0 for b in batches if b.repeated)


def test_nothing_to_train_on_says_why() -> None:
    clips = manifest(np.array([1, 5, 1]), np.array([10, 64, 64]), np.array([10, 64, 64]))
    order = small_order(clips.with_dropped({2: "blur"}), 2)
    with pytest.raises(NoMicroBatchesError, match="1 too small, 1 too short, 1 dropped"):
        order.epoch(0)
    videos = manifest(np.array([3, 3]), np.array([64, 64]), np.array([64, 64]))
    with pytest.raises(NoMicroBatchesError, match="2 too short") as caught:
        small_order(videos, 2).epoch(0)
    assert caught.value.hint is not None
    assert "of images, which videos do not train as" in caught.value.hint


def saved(order: SampleOrder, epoch: int, step: int) -> dict[str, Any]:
    text = json.dumps(order.state(epoch, step))
    assert len(text) < 20_000
    found: dict[str, Any] = json.loads(text)
    return found


def test_resume_on_the_same_ranks_is_the_identical_continuation() -> None:
    clips = generated(3000)
    whole = order_of(clips, 2, 4).epoch(1)
    for step in (0, 1, whole.num_steps // 2, whole.num_steps - 1):
        order = order_of(clips, 2, 4)
        state = saved(order, 1, step)
        fresh = order_of(clips, 2, 4, seed=99)  # the saved seed is taken over
        assert fresh.restore(state) == (1, step)
        assert trained(fresh.epoch(1), step) == trained(whole, step)
        assert trained(fresh.epoch(2)) == trained(order.epoch(2))


def test_end_of_an_epoch_is_the_beginning_of_the_next() -> None:
    clips = small_clips(60)
    for ranks in (3, 4):
        order = small_order(clips, 3)
        state = saved(order, 0, order.epoch(0).num_steps)
        fresh = small_order(clips, ranks)
        assert fresh.restore(state) == (1, 0)
        assert sorted(trained(fresh.epoch(1))) == kept(order, 1).tolist()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_any_changes_of_ranks_still_give_every_row_once(data: st.DataObject, seed: int) -> None:
    clips = small_clips(data.draw(st.integers(10, 150)), seed)
    order = small_order(clips, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2)), seed)
    epoch, step, seen = 0, 0, []
    want = kept(order, 0).tolist()
    if not want:
        return
    for _ in range(data.draw(st.integers(1, 4))):
        laid = order.epoch(0)
        stop = data.draw(st.integers(step, laid.num_steps))
        seen += trained(laid, step, stop)
        state = saved(order, 0, stop)
        order = small_order(clips, data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2)))
        epoch, step = order.restore(state)
        if epoch == 1:
            break
    if epoch == 0:
        seen += trained(order.epoch(0), step)
    assert sorted(seen) == want
    assert sorted(trained(order.epoch(1))) == kept(order, 1).tolist()


def test_costs_may_change_on_resume() -> None:
    """Recomputation switched on changes costs, hence the order: what is left is laid out anew."""
    clips = small_clips(100)
    order = small_order(clips, 3)
    seen = trained(order.epoch(0), 0, 2)
    other = SampleOrder(
        clips, BucketTable(SMALL), lambda b: float(b.frames**2), seed=0, world_size=3
    )
    assert other.restore(saved(order, 0, 2)) == (0, 0)
    assert sorted(seen + trained(other.epoch(0))) == kept(order, 0).tolist()


def test_other_data_is_refused_by_name() -> None:
    state = saved(small_order(small_clips(40), 2), 0, 1)
    with pytest.raises(OrderMismatchError, match=r"40 rows.*41 rows") as more:
        small_order(small_clips(41), 2).restore(state)
    assert "--start-from-scratch" in str(more.value)
    with pytest.raises(OrderMismatchError, match="as many rows, with other contents"):
        small_order(small_clips(40, seed=5), 2).restore(state)


def test_other_buckets_are_refused_by_name() -> None:
    clips = small_clips(40)
    state = saved(small_order(clips, 2), 0, 1)
    changed = {**SMALL, "32x32": {1: (1.0, 6)}, "16x16": {1: (1.0, 6)}}
    order = SampleOrder(clips, BucketTable(changed), lambda b: 1.0, seed=0, world_size=2)
    with pytest.raises(OrderMismatchError) as refused:
        order.restore(state)
    message = str(refused.value)
    assert "32x32 1 frames was [1.0, 7], is [1.0, 6]" in message
    assert "16x16 1 frames was not there, is [1.0, 6]" in message
    assert "--start-from-scratch" in message
    stretched = SampleOrder(clips, BucketTable(SMALL, 2), lambda b: 1.0, seed=0, world_size=2)
    with pytest.raises(OrderMismatchError, match="frame_interval was 1, is 2"):
        stretched.restore(state)


def test_position_of_another_order_is_refused() -> None:
    order = small_order(small_clips(40), 2)
    with pytest.raises(OrderMismatchError, match=r"version 0 .*this is version 2"):
        order.restore(saved(order, 0, 1) | {"version": 0})
