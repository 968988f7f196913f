"""What a layer sends in a training step: `python benchmarks/communication.py`.

Runs STDiT3 on four processes of this machine (gloo) and prints one markdown table, which depends on
no clock: bytes that each rank sends for one layer (a block in space and one in time), by the
formula of `docs/parallel.md` and as counted. Every collective is seen as PyTorch hands it to the
backend; what a rank sends of it follows from its kind: of n ranks that gather, reduce-scatter or
exchange a tensor of b bytes each sends (n - 1) / n · b, and twice that in an all-reduce. The bytes
of a layer are the difference between models of three and of two layers.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.models.config import STDiT3Config
from kinema.models.stdit3 import STDiT3
from kinema.parallel.config import ParallelConfig
from kinema.parallel.engine import Engine
from kinema.parallel.recompute import apply_recompute
from kinema.parallel.sequence import SequenceGroups, share_frames
from kinema.parallel.world import World, open_world

RANKS = 4
CLIPS, FRAMES, SIDE = 2, 5, 6
"""Of a micro-batch: five frames of nine tokens, which four ranks do not divide evenly."""
MASTER = 4
"""Bytes of a weight in the optimizer, and of its gradient when it is averaged."""
MODEL = STDiT3Config(hidden_size=48, num_heads=4, caption_channels=16, model_max_length=8)


@dataclass(frozen=True)
class Way:
    """One way of training.

    Attributes:
        degree: ranks that share a clip.
    """

    name: str
    parallel: ParallelConfig
    dtype: torch.dtype = torch.bfloat16
    accumulation: int = 1
    recompute: str = "none"
    degree: int = 1


def _sharded(kind: Any, over: Any = "all") -> ParallelConfig:
    return ParallelConfig(shard=kind, shard_over=over)


COPIES, SHARED = ParallelConfig(), ParallelConfig(sequence=RANKS)
WAYS = (
    Way("none", COPIES),
    Way("none, 2 micro-batches", COPIES, accumulation=2),
    Way("zero2", _sharded("zero2")),
    Way("zero2, 2 micro-batches", _sharded("zero2"), accumulation=2),
    Way("zero3", _sharded("zero3")),
    Way("zero3, recompute: full", _sharded("zero3"), recompute="full"),
    Way("zero3, 2 micro-batches", _sharded("zero3"), accumulation=2),
    Way("zero2 over 2 of 4 (hybrid)", _sharded("zero2", 2)),
    Way("zero3 over 2 of 4 (hybrid)", _sharded("zero3", 2)),
    Way("zero3 over 2 of 4, 2 micro-batches", _sharded("zero3", 2), accumulation=2),
    Way("sequence: 2", SHARED, degree=2),
    Way("sequence: 4", SHARED, degree=4),
    Way("sequence: 4, recompute: selective", SHARED, recompute="selective", degree=4),
    Way("sequence: 4, recompute: full", SHARED, recompute="full", degree=4),
)


class Counted(TorchDispatchMode):
    """Bytes that this rank sends while it is open, by kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, Fraction] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name == "c10d::_allgather_base_":
            self._add("all-gather", args[0], args[2])
        elif name == "c10d::_reduce_scatter_base_":
            self._add("reduce-scatter", args[1], args[2])
        elif name == "c10d::allreduce_":
            for tensor in args[0]:
                self._add("all-reduce", tensor, args[1], times=2)
        elif name == "_c10d_functional::all_to_all_single":
            self._add("all-to-all", args[0], args[3])
        return func(*args, **(kwargs or {}))

    def _add(self, kind: str, whole: Tensor, group: Any, times: int = 1) -> None:
        if isinstance(group, str):
            ranks = dist.distributed_c10d._resolve_process_group(group).size()
        else:
            ranks = dist.ProcessGroup.unbox(group).size()
        part = Fraction(times * (ranks - 1), ranks) * whole.numel() * whole.itemsize
        self.sent[kind] = self.sent.get(kind, Fraction(0)) + part


def formula(way: Way, rows: list[torch.Size]) -> dict[str, Fraction]:
    """Bytes that a rank sends for one layer in a step, by kind; as in `docs/parallel.md`.

    Args:
        rows: shapes of the layer's parameters.
    """
    if way.degree > 1:
        ranks = way.degree
        frames, tokens = math.ceil(FRAMES / ranks), math.ceil((SIDE // 2) ** 2 / ranks)
        part = CLIPS * frames * ranks * tokens * MODEL.hidden_size * way.dtype.itemsize
        # There and back, forward and backward; and forward once more where all is recomputed.
        times = 6 if way.recompute == "full" else 4
        numbers = sum(math.prod(shape) for shape in rows)
        gradients = Fraction(2 * (RANKS - 1), RANKS) * MASTER * numbers
        return {
            "all-to-all": Fraction(times * (ranks - 1), ranks) * part,
            "all-reduce": gradients,
        }
    if way.parallel.shard == "none":
        numbers = sum(math.prod(shape) for shape in rows)
        return {"all-reduce": Fraction(2 * (RANKS - 1), RANKS) * MASTER * numbers}
    ranks = RANKS if way.parallel.shard_over == "all" else int(way.parallel.shard_over)
    # The first dimension is dealt out, and padded for that.
    padded = sum(math.ceil(s[0] / ranks) * ranks * math.prod(s[1:]) for s in rows)
    share = Fraction(ranks - 1, ranks)
    gathered = 1 if way.parallel.shard == "zero2" else 2 * way.accumulation
    sent = {
        "all-gather": share * gathered * way.dtype.itemsize * padded,
        "reduce-scatter": share * way.accumulation * MASTER * padded,
    }
    if copies := RANKS // ranks - 1:
        sent["all-reduce"] = Fraction(2 * copies, copies + 1) * MASTER * Fraction(padded, ranks)
    return sent


def counted(way: Way, depth: int, world: World, groups: SequenceGroups) -> dict[str, Fraction]:
    """Bytes that this rank sends in a step of a model of so many layers."""
    model = STDiT3(replace(MODEL, depth=depth), torch.Generator().manual_seed(0))
    if way.recompute != "none":
        apply_recompute(model, kind=way.recompute)  # type: ignore[arg-type]
    if way.degree > 1:
        share_frames(model, groups)
    engine = Engine(model, world, way.parallel, dtype=way.dtype)
    gradients = engine.gradients({n: p for n, p in model.named_parameters() if p.requires_grad})
    given = _micro_batch()
    gradients.zero()
    with Counted() as count:
        for micro in range(way.accumulation):
            gradients.expect(last=micro == way.accumulation - 1)
            sharing = groups.use(way.degree) if way.degree > 1 else nullcontext()
            with engine.forward(), sharing:
                loss = model(**given).square().mean()
            loss.backward()
        gradients.finish()
    return count.sent


def _micro_batch() -> dict[str, Tensor]:
    return {
        "x": torch.randn(CLIPS, 4, FRAMES, SIDE, SIDE),
        "timestep": torch.full((CLIPS,), 500.0),
        "y": torch.randn(CLIPS, 1, 8, 16),
        "fps": torch.full((CLIPS,), 24.0),
        "height": torch.full((CLIPS,), 48.0),
        "width": torch.full((CLIPS,), 48.0),
    }


def measure(output: Path) -> None:
    """Fill the table on one of the ranks; rank 0 writes it."""
    with open_world("cpu") as world:
        groups = SequenceGroups(world, RANKS)
        table = []
        layer = [
            parameter.shape
            for name, parameter in STDiT3(replace(MODEL, depth=1)).named_parameters()
            if name.startswith(("spatial_blocks", "temporal_blocks"))
        ]
        for way in WAYS:
            deep, shallow = (counted(way, depth, world, groups) for depth in (3, 2))
            of_layer = {kind: deep[kind] - shallow[kind] for kind in deep}
            want = formula(way, layer)
            table.append((way.name, _floats(want), _floats(of_layer)))
        if world.is_main:
            output.write_text(json.dumps(table))


def _floats(sent: dict[str, Fraction]) -> dict[str, float]:
    return {kind: float(value) for kind, value in sent.items() if value}


def on_ranks(work: Callable[[], None]) -> None:
    """Call `work` in forked processes that find each other as torchrun's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit("a rank failed")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "table.json"
        on_ranks(lambda: measure(output))
        table = json.loads(output.read_text())
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    print("| way | " + " | ".join(kinds) + " | sum | formula |")
    print("|---|" + "--:|" * (len(kinds) + 2))
    wrong = []
    for name, want, got in table:
        cells = " | ".join(f"{got[k]:,.0f}" if k in got else "–" for k in kinds)
        agrees = want.keys() == got.keys() and all(want[k] == got[k] for k in want)
        verdict = "the same" if agrees else f"{sum(want.values()):,.0f}"
        print(f"| {name} | {cells} | {sum(got.values()):,.0f} | {verdict} |")
        if not agrees:
            wrong.append(f"{name}: formula {want}, counted {got}")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
