"""Runs all cases of `parallel_cases` for 2 and for 4 ranks in forked children.

    python -m tests.integration.parallel_driver OUTPUT

Rank 0 of each leaves `OUTPUT/CASE.pt` with what the step made.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported before forking, for speed
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinema.parallel.compile import compile_blocks
from kinema.parallel.config import ParallelConfig
from kinema.parallel.engine import Engine
from kinema.parallel.gather import whole
from kinema.parallel.recompute import apply_recompute
from kinema.parallel.sequence import SequenceGroups, share_frames
from kinema.parallel.world import World, open_world
from kinema.training.config import OptimConfig
from kinema.training.ema import EMA
from kinema.training.optimizer import build_optimizer
from tests.integration.parallel_cases import (
    CASES,
    CLIP,
    DECAY,
    DTYPES,
    EPS,
    LOSS_SCALE,
    LR,
    Case,
    Step,
    build,
    loss_of,
)


def run_case(case: Case, world: World) -> Step:
    """One step as the training loop makes it."""
    model: nn.Module = build(case.freeze)
    if case.recompute != "none":
        apply_recompute(model, kind=case.recompute, every=case.recompute_every)
    if case.compile:
        compile_blocks(model, backend=case.compile)
    config = ParallelConfig(**case.parallel)
    groups = SequenceGroups(world, config.sequence)
    if config.sequence > 1:
        share_frames(model, groups)
    engine = Engine(model, world, config, dtype=DTYPES[case.precision])
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    average = EMA(model, DECAY)
    optimizer = build_optimizer(trained, OptimConfig(lr=LR, eps=EPS, weight_decay=0.01))
    fp16 = case.precision == "fp16"
    scaler = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=LOSS_SCALE)
    gradients = engine.gradients(trained)

    gradients.zero()
    losses = {}
    weight = case.ranks * case.accumulation / case.micro_batches  # as `MicroBatch.weight`
    for micro in range(case.accumulation):
        gradients.expect(last=micro == case.accumulation - 1)
        number = case.number(world.rank, micro)
        with engine.forward(), groups.use(case.degree(micro)):
            loss = loss_of(model, number)
        losses[number] = float(loss.detach())
        scaler.scale(loss * (weight / case.accumulation)).backward()
    gradients.finish()
    if fp16:
        scaler.unscale_(optimizer)
    norm = gradients.norm()
    gradients.scale((CLIP / (norm + 1e-6)).clamp(max=1.0))
    grads = _gathered({n: p.grad for n, p in trained.items() if p.grad is not None}, world)
    scaler.step(optimizer)
    scaler.update()
    average.update(model)
    seen = {number: loss for of_rank in world.gather(losses) for number, loss in of_rank.items()}
    return Step(
        [seen[number] for number in range(case.micro_batches)],
        float(norm),
        grads,
        _gathered(model.state_dict(), world),
        _gathered(average.state_dict(), world),
    )


def _gathered(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    return whole(tensors, world, lambda _: 0)


def overflow(world: World) -> dict[str, Any]:
    """Gradients of fp16 that are too large on rank 1 alone: what this rank's scaler makes of it."""
    model = build()
    engine = Engine(model, world, ParallelConfig(shard="zero3"), dtype=torch.float16)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(trained, OptimConfig(lr=LR))
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
    gradients = engine.gradients(trained)
    gradients.expect(last=True)
    before = [p.detach().to_local().clone() for p in trained.values() if isinstance(p, DTensor)]
    with engine.forward():
        loss = loss_of(model, world.rank)
    scaler.scale(loss * (1e6 if world.rank else 1.0)).backward()
    own = gradients.finish()
    scaler.unscale_(optimizer)
    norm = gradients.norm()
    scaler.step(optimizer)
    scaler.update()
    after = [p.detach().to_local() for p in trained.values() if isinstance(p, DTensor)]
    return {
        "scale": scaler.get_scale(),
        "norm is finite": math.isfinite(float(norm)),
        "own norm is finite": math.isfinite(float(own)),
        "moved": any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)),
    }


def _all_cases(output: Path, ranks: int) -> None:
    with open_world("cpu") as world:
        for name, case in CASES.items():
            if case.ranks == ranks:
                step = run_case(case, world)
                if world.is_main:
                    torch.save(asdict(step), output / f"{name}.pt")
                torch._dynamo.reset()
        if ranks == 2:
            (output / f"overflow-{world.rank}.json").write_text(json.dumps(overflow(world)))


def on_ranks(ranks: int, work: Callable[[int], None]) -> None:
    """Call `work(rank)` in so many forked processes that find each other as torchrun's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        # Two to a machine.
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": str(ranks)}
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        try:
            work(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert not any(codes), codes


def main() -> None:
    output = Path(sys.argv[1])
    output.mkdir(exist_ok=True)
    for ranks in (2, 4):
        on_ranks(ranks, lambda _, n=ranks: _all_cases(output, n))


if __name__ == "__main__":
    main()
