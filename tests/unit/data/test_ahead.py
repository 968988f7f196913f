"""A thread makes the next item while this one is worked on."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.data import loader as loader_module
from kinema.data.ahead import OneAhead
from kinema.data.manifest import Manifest
from kinema.parallel.world import World
from kinema.training.feed import Feed
from tests.integration.train_fixtures import smoke, write_clips


def test_the_next_item_is_made_beside_and_no_other() -> None:
    made: list[int] = []
    two = threading.Event()

    def items() -> Generator[int, None, None]:
        for number in range(4):
            made.append(number)
            if number == 1:
                two.set()
            yield number

    ahead = OneAhead(items())
    assert next(ahead) == 0
    assert two.wait(10), "nobody asked for the second one"
    assert made == [0, 1]
    assert list(ahead) == [1, 2, 3]
    assert list(ahead) == []


def test_an_error_comes_where_its_item_would() -> None:
    def items() -> Generator[int, None, None]:
        yield 0
        raise KinemaError("too many bad files")

    ahead = OneAhead(items())
    assert next(ahead) == 0
    with pytest.raises(KinemaError, match="too many"):
        next(ahead)


def test_who_waits_can_tell_so() -> None:
    told, go_on = [], threading.Event()

    def items() -> Generator[int, None, None]:
        assert go_on.wait(10)
        yield 0

    def tell() -> None:
        told.append(threading.current_thread())
        go_on.set()

    assert next(OneAhead(items(), while_waiting=tell)) == 0
    assert told[0] is threading.current_thread()


def test_closing_ends_the_generator() -> None:
    ended = []

    def items() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            ended.append(True)

    ahead = OneAhead(items())
    next(ahead)
    ahead.close()
    assert ended == [True]


def test_a_gpu_gets_the_same_batches_in_pinned_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.read(write_clips(tmp_path, count=5))
    recipe = smoke(Path(manifest.source), tmp_path / "outputs")
    asked: list[bool] = []
    empty = torch.empty

    def noted(*size: int, pin_memory: bool) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*size)

    monkeypatch.setattr(loader_module.torch, "empty", noted)
    found = {}
    for kind in ("cpu", "cuda"):
        asked.clear()
        clips: list[threading.Thread] = []
        with Feed(recipe, manifest, World(0, 1, torch.device(kind))) as feed:
            feed.on_clip = lambda told=clips: told.append(threading.current_thread())
            for epoch in (0, 0, 1):  # one begun again, as when a run goes back
                steps, batches = feed.epoch(epoch, 0)
                batch = next(batches)
            found[kind] = batch
            next(batches, None)
        assert steps
        assert set(asked) == {kind == "cuda"}
        assert set(clips) <= {threading.current_thread()}
    assert found["cpu"].rows.tolist() == found["cuda"].rows.tolist()
    assert torch.equal(found["cpu"].video, found["cuda"].video)
