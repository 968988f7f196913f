"""Which rank holds the others up."""

from __future__ import annotations

from kinema.training.slow_ranks import IN_A_ROW, SlowRanks

WELL = {"data": 0.1, "forward": 1.0}


def test_a_rank_is_named_once_when_it_was_slow_several_times() -> None:
    ranks = SlowRanks(1.2)
    slow = {"data": 0.9, "forward": 1.0}
    for round_ in range(6):
        spread, found = ranks.compare([WELL, slow, WELL, WELL], [1.0] * 4)
        assert spread == 1.9 / 1.1
        assert [(s.rank, s.phase) for s in found] == (
            [(1, "data")] if round_ == IN_A_ROW - 1 else []
        )


def test_once_is_not_enough_and_being_well_in_between_counts() -> None:
    ranks, slow = SlowRanks(1.2), {"forward": 9.0}
    for work in (slow, slow, WELL, slow, slow):
        assert ranks.compare([WELL, work, WELL], [1.0] * 3)[1] == []


def test_work_is_compared_per_cost() -> None:
    ranks = SlowRanks(1.2)
    for _ in range(IN_A_ROW + 1):
        spread, found = ranks.compare([{"forward": 1.0}, {"forward": 3.0}], [1.0, 3.0])
        assert (spread, found) == (1.0, [])


def test_of_two_the_faster_one_is_the_measure() -> None:
    assert SlowRanks(1.2).compare([{"forward": 1.0}, {"forward": 3.0}], [1.0, 1.0])[0] == 3.0


def test_ranks_without_work_are_left_out() -> None:
    assert SlowRanks(1.2).compare([WELL, {}, {}], [1.0, 0.0, 0.0]) == (None, [])
