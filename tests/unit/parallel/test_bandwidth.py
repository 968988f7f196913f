"""The bandwidth test's arithmetic; processes that really talk: tests/integration."""

from __future__ import annotations

import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.parallel.bandwidth import (
    Bandwidth,
    PairSpeed,
    Speed,
    main,
    measure,
    parse_sizes,
    report,
    rounds,
)
from kinema.parallel.world import World


@pytest.mark.parametrize("count", range(1, 26))
def test_everyone_meets_everyone_once_and_nobody_twice_in_a_round(count: int) -> None:
    plan = rounds(count)
    for meeting in plan:
        members = [node for pair in meeting for node in pair]
        assert len(members) == len(set(members))
    met = sorted(pair for meeting in plan for pair in meeting)
    assert met == [(a, b) for a in range(count) for b in range(a + 1, count)]
    assert len(plan) <= count


def test_sizes() -> None:
    assert parse_sizes("1M,64k,8") == [8, 64 * 2**10, 2**20]
    assert parse_sizes("10") == [8]  # whole float32 values
    for text in ("", "x", "1T", "-4", "3"):
        with pytest.raises(KinemaError, match="no size"):
            parse_sizes(text)


def test_one_process_has_nobody_to_talk_to(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KinemaError, match="nobody"):
        measure(World(0, 1, torch.device("cpu")), [4], iterations=1, warm_up=0)
    assert main(["--device", "cpu"]) == 1
    assert "error: one process has nobody to talk to" in capsys.readouterr().err


def test_the_table_names_wrong_sums() -> None:
    found = Bandwidth(
        "gloo",
        3,
        2,
        (Speed(1024, 0.001, 1.5, 2.0, True), Speed(2048, 0.001, 3.0, 4.0, False)),
        (PairSpeed((0, 1), 2.5, True),),
    )
    lines = report(found).splitlines()
    assert lines[0] == "all-reduce over 3 processes on 2 nodes (gloo)"
    assert "WRONG" not in lines[2]
    assert "WRONG SUMS" in lines[3]
    assert lines[4] == "nodes 0 and 1: bus 2.50 GB/s"
