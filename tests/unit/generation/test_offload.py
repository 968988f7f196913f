"""Networks that are not there all the time: same results, few blocks, few changes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kinema.checkpoint.reader import TensorReader
from kinema.checkpoint.weights import save_weights
from kinema.config.errors import KinemaError
from kinema.generation import engine
from kinema.generation.offload import FileShelf, LayerStream, PinnedShelf
from kinema.generation.parts import CheckpointSource
from kinema.generation.pipeline import Pipeline
from tests.unit.generation.tiny import (
    FAMILIES,
    prompts_of,
    tiny_pipeline,
    write_run,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_off_loaded_is_the_same_to_the_bit(family: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, family)
    every = []
    for offload in ("none", "phase", "layers"):
        pipeline = Pipeline.from_pretrained(run, offload=offload, device="cpu")
        requests = [
            pipeline.request(p, seed=i, num_sampling_steps=2)
            for i, p in enumerate(prompts_of(family)[:2])
        ]
        clips = list(pipeline.generate_all(requests))
        assert [clip.number for clip in clips] == [0, 1]
        assert clips[0].record["offload"] == offload
        every.append([clip.frames for clip in clips])
    for frames in every[1:]:
        assert all((a == b).all() for a, b in zip(frames, every[0], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_two_blocks_are_ever_in_memory(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []
    streams: list[LayerStream] = []

    class Watched(LayerStream):
        def __enter__(self) -> Watched:
            super().__enter__()
            streams.append(self)
            for block in self.blocks:
                block.module.register_forward_pre_hook(self.count)
            return self

        def count(self, *_: Any) -> None:
            assert isinstance(self._shelf, FileShelf)
            resident = sum(not _on_meta(block.module) for block in self.blocks)
            there.append(resident + len(self._shelf._coming))

    monkeypatch.setattr("kinema.generation.offload.LayerStream", Watched)
    run = write_run(tmp_path, family, depth=4)
    pipeline = Pipeline.from_pretrained(run, offload="layers", device="cpu")
    pipeline.latents([pipeline.request(prompts_of(family)[0], seed=1)])
    (stream,) = streams
    count = 8 if family == "stdit3" else 4
    assert len(stream.blocks) == count
    assert len(there) == 3 * count  # once per step
    # The one that runs, and from the second step on the one that comes next.
    assert set(there[:count]) == {1}
    assert set(there[count:]) == {2}
    assert all(_on_meta(block.module) for block in stream.blocks)


def _on_meta(module: nn.Module) -> bool:
    return all(p.is_meta for p in module.parameters())


def test_layers_outside_of_their_block_bring_their_own_tensors(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.inner(x))

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 4))
    whole.blocks = nn.ModuleList(Block() for _ in range(3))
    save_weights(tmp_path / "model.safetensors", whole.state_dict())
    x = torch.randn(2, 4)
    expected = [block.inner(x) for block in whole.blocks]
    with (
        TensorReader(tmp_path / "model.safetensors") as reader,
        LayerStream(whole, reader.read, CPU),
    ):
        for block, want in zip(whole.blocks, expected, strict=True):
            assert torch.equal(block.inner(x), want)
            assert block.inner.weight.is_meta
            assert block.other.weight.is_meta
        # A block that fails goes all the same.
        with pytest.raises(RuntimeError):
            whole.blocks[1](torch.randn(2, 3))
        assert whole.blocks[1].other.weight.is_meta
        for block in whole.blocks:
            block(x)


class FakeGPU:
    """Streams and events that only write down what is asked of them, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, object]] = []
        self.current = "compute"
        gpu = self

        class Event:
            def record(self, stream: Stream) -> None:
                gpu.log.append((stream.name, "record", self))

        class Stream:
            def __init__(self, device: object = None, name: str = "copy") -> None:
                self.name = name

            def wait_event(self, event: Event) -> None:
                gpu.log.append((self.name, "wait", event))

            def wait_stream(self, stream: Stream) -> None:
                gpu.log.append((self.name, "wait", stream.name))

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            yield

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(name="compute"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)


def test_the_shelf_for_gpus_has_two_slots_and_waits_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The logic alone: a CPU stands in for the GPU, and streams are written down, not run."""
    gpu = FakeGPU(monkeypatch)
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(4, 4))
    whole.blocks = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(5))
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    x = torch.randn(2, 4, dtype=torch.float64)
    expected = [block(x) for block in whole.blocks]
    stream = LayerStream(whole, state.__getitem__, CPU)
    shelf = PinnedShelf(stream.blocks, state.__getitem__, CPU)
    stream._shelf = shelf
    with stream:
        for _ in range(3):
            for block, want in zip(whole.blocks, expected, strict=True):
                assert torch.equal(block(x), want)
        slots = [(slot.ready, slot.free) for slot in shelf._slots]
        assert len(slots) == 2
        log = list(gpu.log)
        # Out of order: what came in vain makes room.
        for number in (3, 1, 1, 4):
            assert torch.equal(whole.blocks[number](x), expected[number])
    # In order, each slot goes round: the copy waits until it is free and says when it is there; the
    # computation waits for that and says when the slot is free again.
    turn = ["copy wait free", "copy record ready", "compute wait ready", "compute record free"]
    for ready, free in slots:
        names = {ready: "ready", free: "free"}
        steps = [f"{who} {what} {names[e]}" for who, what, e in log if e in names]
        turns = len(steps) // 4
        assert turns >= 5  # the first pass, without foresight, needs one slot only
        assert steps[: 4 * turns] == turn * turns


def test_networks_change_places_once_for_all_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, "stdit2")
    read: list[str] = []

    def watched(name: str) -> None:
        original = getattr(CheckpointSource, name)

        def fill(*args: Any, **kwargs: Any) -> Any:
            if not kwargs.get("leave"):  # else it is only looked whether they fit
                read.append(name.removeprefix("fill_"))
            return original(*args, **kwargs)

        monkeypatch.setattr(CheckpointSource, name, fill)

    watched("fill_model")
    watched("fill_vae")
    pipeline = Pipeline.from_pretrained(run, offload="phase", device="cpu")
    assert len(list(pipeline.generate_all([pipeline.request(p) for p in "abc"]))) == 3
    assert read == ["model", "vae"]
    read.clear()
    long = [pipeline.request(p, loop=2) for p in "ab"] + [pipeline.request("c")]
    clips = list(pipeline.generate_all(long, batch_size=2))
    assert read == ["model", "vae"] * 2
    assert [(clip.number, len(clip.frames)) for clip in clips] == [(2, 6), (0, 10), (1, 10)]
    read.clear()
    stays = Pipeline.from_pretrained(run, device="cpu")
    for prompt in "ab":
        stays.generate(prompt)
    assert read == ["model", "vae"]


def test_finished_videos_are_let_go_and_long_ones_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_pretrained(
        write_run(tmp_path, "stdit2"), offload="phase", device="cpu"
    )
    short = [pipeline.request(p, num_sampling_steps=1) for p in "abc"]
    gone = [weakref.ref(clip.frames) for clip in pipeline.generate_all(short)]
    assert [frames() is None for frames in gone] == [True, True, True]

    long = [replace(request, loop=2) for request in short]
    frame_bytes = 6 * 32 * 32 * 3
    monkeypatch.setattr("kinema.generation.pipeline.WAITING_BYTES", 2 * frame_bytes)
    sampled: list[int] = []
    original = engine.sample

    def watch(*args: Any, **kwargs: Any) -> Any:
        sampled.append(kwargs["segment"])
        return original(*args, **kwargs)

    monkeypatch.setattr(engine, "sample", watch)
    clips = list(pipeline.generate_all([*long, short[0]]))
    assert sampled == [0, 0, 1, 1, 0, 0, 1]  # two long ones together, then the third and the short
    assert [clip.number for clip in clips] == [0, 1, 3, 2]


@pytest.mark.parametrize("offload", ["none", "phase"])
def test_an_interruption_gives_out_what_is_finished(offload: str, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(write_run(tmp_path), offload=offload, device="cpu")
    requests = [pipeline.request(p) for p in "abcd"]
    steps = 0

    def interrupt(_: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 2 * 3 + 2:  # in the third video
            raise KeyboardInterrupt

    found = []
    clips = pipeline.generate_all(requests, on_step=interrupt)
    with pytest.raises(KeyboardInterrupt):
        found.extend(clip.number for clip in clips)
    assert found == [0, 1]


def test_what_cannot_be_off_loaded_is_said(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(KinemaError, match="one of none, phase, layers"):
        Pipeline(pipeline.config, pipeline.load(), offload="lots")
    with pytest.raises(KinemaError, match="streamed from files"):
        Pipeline(pipeline.config, pipeline.load(), offload="layers")
    with pytest.raises(KinemaError, match="compiled"):
        Pipeline.from_pretrained(write_run(tmp_path), offload="layers", compile=True)
    phased = Pipeline.from_pretrained(tmp_path / "000-tiny", offload="phase")
    with pytest.raises(KinemaError, match="never in memory together"):
        phased.load()
