"""What a run measures of itself."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from kinema.config.recipe import load_recipe
from kinema.data.buckets import Bucket
from kinema.parallel.world import World
from kinema.training import meters as module
from kinema.training import waits as waits_module
from kinema.training.config import TrainRecipe
from kinema.training.cost import tokens_per_clip, useful_flops
from kinema.training.meters import Meters, peak_tflops, step_keys, weight_norm
from kinema.training.run_folder import first_start
from kinema.training.waits import Waits
from kinema.training.window import LEVEL_NAMES, Window, level_name

CPU = torch.device("cpu")
BUCKET = Bucket(0, "16x16", 5, 1.0, 16, 16, 4)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
        self.now = 1000.0
        monkeypatch.setattr(target, "perf_counter", lambda: self.now)


class OtherRanks(World):
    """Rank 1 of three, whose others said what is given."""

    others: list[list[float]]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        for row, other in zip((0, 2), self.others, strict=True):
            assert not values[row].any()
            values[row] = torch.tensor(other, dtype=values.dtype)
        return values


def recipe(*overrides: str) -> TrainRecipe:
    return load_recipe("tiny/smoke", TrainRecipe, ["data.path=x", *overrides])


def totals(**values: float) -> dict[str, float]:
    return dict.fromkeys(step_keys(["16x16-5f"], ()), 0.0) | values


def test_bins_of_noise() -> None:
    assert len(LEVEL_NAMES) == 10
    assert LEVEL_NAMES[0] == level_name(0.0) == level_name(0.0999) == "0.0-0.1"
    assert level_name(1.0) == level_name(0.95) == "0.9-1.0"
    # Whole timesteps at an edge go up.
    assert [level_name(t / 1000) for t in range(0, 1000, 100)] == list(LEVEL_NAMES)


def test_loss_by_noise_is_a_mean_over_samples_and_resumes() -> None:
    window = Window()
    seen = totals(**{"level loss/0.2-0.3": 3.0, "level count/0.2-0.3": 2.0})
    window.add(seen, grad_norm=1.0)
    window = Window.from_state(json.loads(json.dumps(window.state())))
    window.add(totals(**{"level loss/0.2-0.3": 3.0, "level count/0.2-0.3": 1.0}), grad_norm=1.0)
    record = window.record()
    assert record["loss_t/0.2-0.3"] == 2.0
    assert [key for key in record if key.startswith("loss_t/")] == ["loss_t/0.2-0.3"]


def test_pace_counts_steps_and_not_what_is_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, module.time)
    monkeypatch.setattr(module.time, "time", lambda: 5000.0)
    meters = Meters(recipe("tracking.peak_tflops=4"), World(0, 1, CPU), first_start=5000.0 - 200.0)
    for _ in range(4):
        meters.add_step(totals(samples=8.0, tokens=640.0, tflop=3.0))
    for _ in range(3):  # one of four was skipped
        meters.add_update()
    clock.now += 10.0
    phases = {"data": 1.5, "forward": 2.0, "save": 1.0, "validation": 2.5, "warm up": 0.5}
    found = meters.take(phases, useful_s=150.0)
    assert found["step_s"] == pytest.approx(6.0 / 3)  # 10 s, 4 of them for other things
    assert found["samples_per_s"] == pytest.approx(32 / 6)
    assert found["tokens_per_s"] == pytest.approx(2560 / 6)
    assert found["tflops_per_rank"] == pytest.approx(2.0)
    assert found["mfu_pct"] == pytest.approx(50.0)
    assert found["data_wait_pct"] == pytest.approx(25.0)
    assert found["wait/data_s"] == pytest.approx(1.5)
    assert found["goodput_pct"] == pytest.approx(75.0)
    assert not any("collective" in key or "worst" in key for key in found)  # alone
    # The next record begins anew.
    meters.add_step(totals(samples=1.0, tokens=80.0))
    meters.add_update()
    clock.now += 2.0
    assert meters.take({}, useful_s=150.0)["tokens_per_s"] == pytest.approx(40.0)


def test_mean_and_worst_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, module.time)
    world = OtherRanks(1, 3, CPU)
    meters = Meters(recipe(), world)
    meters.add_step(totals(samples=30.0, tokens=90.0, tflop=60.0))
    meters.add_update()
    with meters.waits.host():
        clock.now += 2.0
    clock.now += 8.0
    monkeypatch.setattr(meters, "_memory", lambda: {"memory/host_gib": 2.0})
    world.others = [[1.0, 0.0, 1.0], [6.0, 1.0, 4.0]]
    found = meters.take({"data": 2.0}, useful_s=0.0)
    assert found["tflops_per_rank"] == pytest.approx(2.0)
    assert found["tokens_per_s"] == pytest.approx(9.0)
    assert found["data_wait_pct"] == pytest.approx(30.0)
    assert (found["wait/data_worst_pct"], found["wait/data_worst_rank"]) == (pytest.approx(60.0), 2)
    assert found["collective_wait_pct"] == pytest.approx(10.0)
    assert found["wait/collective_worst_pct"] == pytest.approx(20.0)
    assert found["wait/collective_worst_rank"] == 1
    assert found["memory/host_gib"] == 4.0


def test_memory_of_the_rank_and_its_decode_workers() -> None:
    me = os.getpid()
    gone = 2**22 + 1  # above the largest process id
    meters = Meters(recipe(), World(0, 1, CPU), decoders=lambda: [me, gone, me])
    meters.add_step(totals())
    meters.add_update()
    found = meters.take({}, useful_s=0.0)
    resident = psutil.Process().memory_info().rss / 2**30
    assert found["memory/host_gib"] == pytest.approx(resident, rel=0.2)
    assert found["memory/decoders_gib"] == pytest.approx(2 * resident, rel=0.2)
    assert not any("gpu" in key for key in found)


def test_useful_flops_leave_out_what_is_recomputed_and_what_is_frozen() -> None:
    plain = recipe()
    assert plain.model is not None
    assert plain.text is not None
    latent = plain.vae.latent_size(5, 16, 16)
    forward = plain.model.forward_flops(latent, plain.text.max_tokens)
    assert useful_flops(plain)(BUCKET) == 3 * forward
    assert useful_flops(recipe("recompute=full"))(BUCKET) == 3 * forward
    tokens = tokens_per_clip(plain)
    assert tokens is not None
    assert module.Work(plain).tokens(BUCKET) == tokens(BUCKET)
    assert module.Work(plain).tflop(BUCKET) == pytest.approx(3 * forward / 1e12)


def test_the_peak_is_what_was_set_and_never_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops(recipe(), CPU) is None
    assert peak_tflops(recipe("tracking.peak_tflops=1.5"), CPU) == 1.5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda", 0)
    assert peak_tflops(recipe("precision=bf16"), gpu) == 989.4
    assert peak_tflops(recipe("precision=fp32"), gpu) is None
    with pytest.raises(Exception, match="peak_tflops"):
        recipe("tracking.peak_tflops=0")


def test_weight_norm_of_whole_tensors() -> None:
    parameters = [torch.nn.Parameter(torch.full((3,), 2.0)), torch.nn.Parameter(torch.ones(2, 2))]
    assert weight_norm(parameters) == pytest.approx((3 * 4 + 4) ** 0.5)


def test_waits_count_each_moment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, waits_module.time)
    waits = Waits(CPU)
    with waits.stream():
        clock.now += 1.0
        with waits.host():
            clock.now += 2.0
    clock.now += 10.0
    with waits.ignored(), waits.host():
        clock.now += 20.0
    assert waits.take() == pytest.approx(3.0)
    assert waits.take() == 0.0


class Event:
    """Stands in for a CUDA event: the moment at which it was recorded on the stream."""

    stream = 0.0
    ready = True

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.stream

    def query(self) -> bool:
        return Event.ready

    def elapsed_time(self, other: Event) -> float:
        return 1000.0 * (other.at - self.at)


def test_on_a_gpu_the_stream_is_asked_and_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits = Waits(torch.device("cuda"))
    with waits.stream():
        Event.stream += 0.25
        with waits.stream():
            Event.stream += 0.5
    Event.ready = False
    waits.settle()
    assert waits.take() == 0.0  # the step is not over: asked again later
    Event.ready = True
    assert waits.take() == pytest.approx(0.75)


def test_a_run_has_one_first_start(tmp_path: Path) -> None:
    now = time.time()
    assert first_start(tmp_path, now) == now
    assert first_start(tmp_path, now + 3600) == pytest.approx(now, abs=0.001)
