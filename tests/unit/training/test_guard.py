"""What counts as a spike, and who is blamed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kinema.training.config import GuardConfig
from kinema.training.guard import Guard, GuardError, Spike, Work, write_spike

CONFIG = GuardConfig(window=10, factor=3.0, skips=2, rollbacks=1)


def trained(config: GuardConfig = CONFIG) -> Guard:
    """A full window: losses of 1 on short clips and 0.2 on long ones, which are rare."""
    guard = Guard(config)
    for step in range(12):
        losses = {"short": (4.0, 4)}
        if step % 2:
            losses["long"] = (0.2, 1)
        guard.accept(losses, norm=2.0)
    return guard


def work(bucket: str, loss: float, *rows: int, rank: int = 0) -> Work:
    return Work(rank, bucket, loss, list(rows), [f"{row}.mp4" for row in rows])


def test_loss_is_compared_with_what_its_own_bucket_loses() -> None:
    guard = trained()
    assert guard.judge({"long": (0.5, 1)}, 2.0) is None
    spike = guard.judge({"long": (0.9, 1)}, 2.0)  # less than short clips lose, and a spike
    assert spike is not None
    assert (spike.loss, spike.usual_loss) == (0.9, pytest.approx(0.2))
    assert guard.judge({"short": (11.0, 4)}, 2.0) is None
    assert guard.judge({"short": (13.0, 4)}, 2.0)
    # One of several: 4 short and 1 long usually lose 4.2 together.
    assert guard.judge({"short": (12.0, 4), "long": (0.5, 1)}, 2.0) is None
    assert guard.judge({"short": (12.0, 4), "long": (0.9, 1)}, 2.0)


def test_of_a_rare_bucket_only_the_norm_speaks() -> None:
    guard = trained()
    assert guard.judge({"new": (100.0, 1)}, 2.0) is None
    assert guard.judge({"new": (0.1, 1)}, 6.1)
    for _ in range(4):
        guard.accept({"new": (0.1, 1)}, norm=2.0)
    assert guard.judge({"new": (100.0, 1)}, 2.0) is None
    guard.accept({"new": (0.1, 1)}, norm=2.0)
    assert guard.judge({"new": (100.0, 1)}, 2.0)  # not rare any more


def test_nothing_is_left_out_before_the_window_is_full_but_what_is_no_number() -> None:
    guard = Guard(CONFIG)
    for _ in range(9):
        assert guard.judge({"short": (1e9, 1)}, 1e9) is None
        guard.accept({"short": (1.0, 1)}, 1.0)
    assert guard.judge({"short": (math.nan, 1)}, 1.0)
    assert guard.judge({"short": (1.0, 1)}, math.inf)
    guard.accept({"short": (1.0, 1)}, 1.0)
    assert guard.judge({"short": (1e9, 1)}, 1.0)


def test_the_micro_batch_that_stands_out_is_blamed_else_all() -> None:
    guard = trained()
    works = [work("short", 1.2, 1, 2), work("short", 50.0, 3, 4, rank=1), work("new", 9.0, 5)]
    assert guard.faulty(works) == [works[1]]
    assert guard.faulty(works[::2]) == works[::2]
    assert guard.faulty([works[0], work("new", math.nan, 6)])[0].rows == [6]


def test_after_so_many_in_a_row_the_run_goes_back_and_passes_over_their_clips() -> None:
    guard = trained()
    assert not guard.skip(3, [work("short", 9.0, 7, 1)])
    assert guard.skip(4, [work("short", 9.0, 2)])
    guard.go_back("run")
    assert guard.passed_over(3) == {1, 7}
    assert guard.passed_over(4) == {2}
    assert guard.passed_over(5) == set()
    assert not guard.skip(4, [work("short", 9.0, 3)])  # counts anew
    guard.skip(4, [work("short", 9.0, 3)])
    with pytest.raises(GuardError, match="after going back 1 times"):
        guard.go_back("run")


def test_an_update_in_between_ends_the_row() -> None:
    guard = trained()
    assert not guard.skip(0, [work("short", 9.0, 1)])
    guard.accept({"short": (1.0, 1)}, 2.0)
    assert not guard.skip(0, [work("short", 9.0, 2)])


def test_state_goes_through_json_and_what_was_learnt_survives_going_back() -> None:
    guard = trained()
    before = json.loads(json.dumps(guard.state()))
    fresh = Guard(CONFIG)
    fresh.restore(before)
    assert fresh.state() == guard.state()
    for row in (1, 2):
        guard.skip(0, [work("short", 9.0, row)])
    guard.go_back("run")
    guard.restore(before)  # the checkpoint is older than the spikes
    assert guard.passed_over(0) == {1, 2}
    assert guard.rollbacks == 1
    guard.restore(None)  # one that was written without a guard
    assert guard.window == before["window"]
    shorter = Guard(GuardConfig(window=3, factor=3.0, skips=2, rollbacks=1))
    shorter.restore(before)
    assert shorter.window == before["window"][-3:]


def test_a_save_beside_training_has_the_guard_of_its_own_step() -> None:
    guard = trained()
    guard.skip(0, [work("short", 9.0, 1)])
    put_aside = guard.state()
    of_now = json.dumps(put_aside)
    guard.accept({"short": (8.0, 4)}, norm=3.0)
    assert json.dumps(put_aside) == of_now


def test_a_line_per_spike_also_of_what_is_no_number(tmp_path: Path) -> None:
    spike = Spike(loss=math.nan, usual_loss=1.0, norm=math.inf, usual_norm=None)
    works = [work("short", math.nan, 4, rank=3)]
    write_spike(tmp_path, spike, step=9, position=(1, 2), works=works)
    line = json.loads((tmp_path / "spikes.jsonl").read_text())
    assert (line["step"], line["epoch"], line["epoch_step"]) == (9, 1, 2)
    assert line["loss"] is None
    assert line["micro_batches"][0] == {
        "rank": 3, "bucket": "short", "loss": None, "rows": [4], "paths": ["4.mp4"],
    }  # fmt: skip
