"""What a run measures of itself, beside its losses: `docs/telemetry.md` explains every number."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinema.data.loader import Batch
from kinema.parallel.world import World
from kinema.telemetry.peaks import bf16_tflops
from kinema.training.config import TrainRecipe
from kinema.training.cost import tokens_per_clip, useful_flops
from kinema.training.feed import bucket_label
from kinema.training.tasks import LossReport
from kinema.training.waits import Waits
from kinema.training.window import LEVEL_NAMES, level_name

ASIDE = ("warm up", "save", "preview", "validation", "order")
"""Phases that are no part of a step."""
GIB = 2**30


def step_keys(labels: Iterable[str], parts: Iterable[str]) -> list[str]:
    """Names of the numbers that ranks sum at each step, the same on every rank.

    Args:
        labels: of all buckets.
        parts: of the task's loss.
    """
    return [
        *(f"{kind}/{label}" for label in labels for kind in ("loss", "count")),
        *(f"{kind}/{level}" for level in LEVEL_NAMES for kind in ("level loss", "level count")),
        *(f"part/{name}" for name in parts),
        *("samples", "tokens", "tflop", "unreadable"),
    ]


class Work:
    """What clips of a bucket are to the hardware: tokens, and FLOPs that are of use."""

    def __init__(self, recipe: TrainRecipe) -> None:
        tokens, flops = tokens_per_clip(recipe), useful_flops(recipe)
        self.tokens = cache(lambda bucket: 0 if tokens is None else tokens(bucket))
        self.tflop = cache(lambda bucket: flops(bucket) / 1e12)


def add_micro_batch(
    seen: dict[str, float], batch: Batch, report: LossReport, loss: float, work: Work
) -> None:
    """Add a micro-batch to what this rank saw of a step (`step_keys`).

    Args:
        loss: `report.loss` on the host.
    """
    label, clips = bucket_label(batch.bucket), len(batch.rows)
    seen[f"loss/{label}"] += loss
    seen[f"count/{label}"] += 1
    seen["samples"] += clips
    seen["tokens"] += clips * work.tokens(batch.bucket)
    seen["tflop"] += clips * work.tflop(batch.bucket)
    for name, value in report.parts.items():
        seen[f"part/{name}"] += float(value)
    if report.samples is not None and report.levels is not None:
        levels = report.levels.tolist()
        for level, sample in zip(levels, report.samples.tolist(), strict=True):
            seen[f"level loss/{level_name(level)}"] += sample
            seen[f"level count/{level_name(level)}"] += 1


@dataclass
class _Pace:
    """What was done since the last record."""

    start: float
    samples: float = 0.0
    tokens: float = 0.0
    tflop: float = 0.0
    steps: int = 0


class Meters:
    """Times, counts and sizes of one rank, and what all ranks together make of them."""

    def __init__(
        self,
        recipe: TrainRecipe,
        world: World,
        *,
        decoders: Callable[[], Sequence[int]] = tuple,
        first_start: float | None = None,
    ) -> None:
        """
        Args:
            decoders: process ids of this rank's decode workers.
            first_start: when the run began for the first time, seconds since 1970; now by default.
        """
        self.waits = Waits(world.device)
        self.work = Work(recipe)
        self._world = world
        self._decoders = decoders
        self._first_start = time.time() if first_start is None else first_start
        self._peak = peak_tflops(recipe, world.device)
        self._process = psutil.Process()
        self._pace = _Pace(time.perf_counter())

    def begin(self) -> None:
        """Count from now on: what was before is no part of a step."""
        self._pace = _Pace(time.perf_counter())
        self.waits.take()

    def add_step(self, total: Mapping[str, float]) -> None:
        """Count a step that all ranks took.

        Args:
            total: sums over ranks by `step_keys`.
        """
        self._pace.samples += total["samples"]
        self._pace.tokens += total["tokens"]
        self._pace.tflop += total["tflop"]
        self.waits.settle()

    def add_update(self) -> None:
        """Count an update that was made."""
        self._pace.steps += 1

    def take(self, phases: Mapping[str, float], useful_s: float) -> dict[str, Any]:
        """The numbers since the last call. Collective: every rank calls it at the same steps.

        Args:
            phases: seconds of this rank per phase since the last call.
            useful_s: seconds of all updates that count, since the run's first start.
        """
        now = time.perf_counter()
        pace, self._pace = self._pace, _Pace(now)
        seconds = now - pace.start - sum(phases.get(name, 0.0) for name in ASIDE)
        waited = {"data": phases.get("data", 0.0)}
        if self._world.size > 1:
            waited["collective"] = self.waits.take()
        ranks = self._all_ranks({**waited, **self._memory()})
        result: dict[str, Any] = {
            "step_s": seconds / pace.steps,
            "samples_per_s": pace.samples / seconds,
        }
        if pace.tokens:
            result["tokens_per_s"] = pace.tokens / seconds
        tflops = pace.tflop / seconds / self._world.size
        result["tflops_per_rank"] = tflops
        result["mfu_pct"] = None if self._peak is None else 100.0 * tflops / self._peak
        for name in waited:
            spent = ranks[name]
            result[f"{name}_wait_pct"] = 100.0 * float(spent.mean()) / seconds
            result[f"wait/{name}_s"] = float(spent.mean())
            if self._world.size > 1:
                worst = int(spent.argmax())
                result[f"wait/{name}_worst_pct"] = 100.0 * float(spent[worst]) / seconds
                result[f"wait/{name}_worst_rank"] = worst
        result["goodput_pct"] = 100.0 * useful_s / max(time.time() - self._first_start, 1e-9)
        memory = [name for name in ranks if name.startswith("memory/")]
        return result | {name: float(ranks[name].max()) for name in memory}

    def _memory(self) -> dict[str, float]:
        """GiB of this rank; the GPU's peaks start anew."""
        result = {}
        device = self._world.device
        if device.type == "cuda":
            result["memory/gpu_allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
            result["memory/gpu_reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
            torch.cuda.reset_peak_memory_stats(device)
        result["memory/host_gib"] = self._process.memory_info().rss / GIB
        result["memory/decoders_gib"] = sum(_resident(pid) for pid in self._decoders()) / GIB
        return result

    def _all_ranks(self, values: Mapping[str, float]) -> dict[str, Tensor]:
        """Each rank's values, float64 `[ranks]` by name, on every rank."""
        table = torch.zeros(self._world.size, len(values), dtype=torch.float64)
        table[self._world.rank] = torch.tensor(list(values.values()), dtype=torch.float64)
        self._world.sum(table)
        return dict(zip(values, table.unbind(1), strict=True))


def peak_tflops(recipe: TrainRecipe, device: torch.device) -> float | None:
    """What MFU is a share of, TFLOP/s: `tracking.peak_tflops`, or what the maker of the GPU states
    for bf16 and fp16; None where neither is known."""
    if recipe.tracking.peak_tflops is not None:
        return recipe.tracking.peak_tflops
    if device.type != "cuda" or recipe.precision == "fp32":
        return None
    return bf16_tflops(torch.cuda.get_device_name(device))


def weight_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Norm of all parameters together, sharded or not. Collective where they are sharded."""
    whole: list[Tensor] = []
    parts: list[Tensor] = []
    groups: list[dist.ProcessGroup] = []
    for parameter in parameters:
        value = parameter.detach()
        placements = getattr(value, "placements", None)
        if placements is None:
            whole.append(value)
            continue
        assert hasattr(value, "to_local")
        assert hasattr(value, "device_mesh")
        parts.append(value.to_local())
        # Copies of the model hold the same parts: over the ranks of one copy alone.
        groups = [value.device_mesh.get_group(i) for i, p in enumerate(placements) if p.is_shard()]
    total = _squares(whole)
    if parts:
        shared = _squares(parts)
        for group in groups:
            dist.all_reduce(shared, group=group)
        total = total.to(shared.device) + shared
    return math.sqrt(float(total))


def _squares(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it was replaced meanwhile
        return 0
