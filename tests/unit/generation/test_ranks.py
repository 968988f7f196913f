"""Who makes what, and under which name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.generation.config import GenerateRequest
from kinema.generation.ranks import RankError, choose_names, share, together
from kinema.parallel.world import World
from tests.unit.generation.tiny import tiny_pipeline

CPU = torch.device("cpu")


def worlds(size: int) -> list[World]:
    return [World(rank, size, CPU, size) for rank in range(size)]


def test_shares_are_whole_batches_and_cover_everything_once() -> None:
    batches = [[0, 1], [2, 3], [4], [5, 6], [7]]
    for size in (1, 2, 3, 8):
        shares = [share(batches, world) for world in worlds(size)]
        assert sorted(b for s in shares for b in s) == batches
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_process_makes_its_share_as_one_alone_would() -> None:
    pipeline = tiny_pipeline("stdit2")
    requests = [pipeline.request(p, seed=i) for i, p in enumerate("abcde")]
    alone = {c.number: c.frames for c in pipeline.generate_all(requests, batch_size=2)}
    assert sorted(alone) == [0, 1, 2, 3, 4]
    found = {}
    for world in worlds(2):
        for clip in pipeline.generate_all(requests, batch_size=2, world=world):
            assert clip.number not in found
            found[clip.number] = clip
    assert sorted(found) == sorted(alone)
    for number, clip in found.items():
        assert (clip.frames == alone[number]).all()
        assert clip.request == requests[number]
    # More processes than batches: some have nothing to do.
    assert list(pipeline.generate_all(requests[:1], world=worlds(4)[3])) == []


def test_names_are_all_different_and_new(tmp_path: Path) -> None:
    def request(prompt: str, **values: int) -> GenerateRequest:
        usual = {"width": 32, "height": 32, "num_frames": 6}
        return GenerateRequest(prompt=prompt, **usual | values)  # type: ignore[arg-type]

    (tmp_path / "a-seed0.json").touch()
    requests = [request("a"), request("A!"), request("a", num_frames=1), request("b", sample=1)]
    names = choose_names(tmp_path, requests, worlds(1)[0])
    assert [n.name for n in names] == [
        "a-seed0-again2.mp4",
        "a-seed0-again3.mp4",
        "a-seed0-again4.png",
        "b-seed0-2.mp4",
    ]
    stems = choose_names(tmp_path, requests[:2], worlds(1)[0], stems=["x", "x"])
    assert [n.name for n in stems] == ["x.mp4", "x-again2.mp4"]


def test_a_failure_names_its_process() -> None:
    with pytest.raises(KinemaError, match=r"^broken$"), together(worlds(1)[0]):
        raise KinemaError("broken")
    with (
        pytest.raises(RankError, match=r"a\.png: process 1 of 2: broken") as caught,
        together(worlds(2)[1]),
    ):
        raise KinemaError("broken", where="a.png", hint="mend it")
    assert caught.value.hint == "mend it"
