"""The ways of running a step in parallel that are proven, and the step that each must equal.

`docs/parallel.md` has the same table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kinema.models.config import STDiT3Config
from kinema.models.stdit3 import STDiT3
from kinema.training.parts import freeze

LR, EPS, CLIP, DECAY = 0.1, 0.05, 0.5, 0.9
"""With a large eps an update is proportional to its gradient, also where that is next to zero."""
LOSS_SCALE = 1024.0
"""Of fp16."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODEL = STDiT3Config(depth=2, hidden_size=24, num_heads=2, caption_channels=8, model_max_length=6)


@dataclass(frozen=True)
class Case:
    """One way of running a step.

    Attributes:
        parallel: settings of the recipe.
        accumulation: micro-batches of each rank.
        degrees: ranks that share each of them; by default none does.
        compile: backend.
        tolerance: of a tensor's length: sums in another order. Half precision computes the same
            numbers in the reference, and is summed in float32 as well; but several ranks that share
            a micro-batch multiply other numbers of rows, and each rounds its part.
    """

    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulation: int = 1
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_every: int = 1
    compile: str | None = None
    freeze: tuple[str, ...] = ()
    degrees: tuple[int, ...] = ()
    tolerance: float = 2e-5

    def degree(self, micro: int) -> int:
        """Ranks that share the micro-th micro-batch of each rank."""
        return self.degrees[micro] if self.degrees else 1

    def number(self, rank: int, micro: int) -> int:
        """Which micro-batch of the step that is."""
        before = sum(self.ranks // self.degree(m) for m in range(micro))
        return before + rank // self.degree(micro)

    @property
    def micro_batches(self) -> int:
        """Different ones of a step."""
        return 1 + self.number(self.ranks - 1, self.accumulation - 1)

    @property
    def reference(self) -> tuple[str, int, tuple[str, ...]]:
        """What its numbers depend on."""
        return self.precision, self.micro_batches, self.freeze


FROZEN = ("y_embedder", "spatial_blocks.*.attn", "temporal_blocks.1")
ZERO2, ZERO3 = {"shard": "zero2"}, {"shard": "zero3"}
PAIRS, NODES = {"shard_over": 2}, {"shard_over": "node"}
CASES = {
    "copies": Case(2, accumulation=2, recompute="selective"),
    "zero2": Case(2, ZERO2, accumulation=4, recompute="full"),
    "zero3-bf16": Case(2, ZERO3, "bf16", accumulation=2, recompute="full", recompute_every=2),
    "zero3-fp16": Case(2, ZERO3, "fp16", accumulation=2, compile="eager"),
    "zero3-compiled": Case(2, ZERO3, recompute="full", compile="aot_eager"),
    "zero2-frozen": Case(4, ZERO2, recompute="selective", freeze=FROZEN),
    "hybrid-zero2-bf16": Case(4, ZERO2 | PAIRS, "bf16", accumulation=2, recompute="selective"),
    "hybrid-zero3": Case(4, ZERO3 | NODES, accumulation=2, recompute="full"),
    # Of 2, 3 or 4 frames and 4 or 6 places each: padded, and fewer frames than ranks.
    "sequence": Case(2, {"sequence": 2}, accumulation=2, degrees=(2, 1), recompute="selective"),
    "sequence-zero2-bf16": Case(
        4, ZERO2 | {"sequence": 2}, "bf16", accumulation=2, degrees=(2, 2), tolerance=0.03
    ),
    "sequence-zero3": Case(
        4, ZERO3 | {"sequence": 4}, accumulation=3, degrees=(2, 4, 1), recompute="full"
    ),
    "sequence-zero3-compiled": Case(
        2, ZERO3 | {"sequence": 2}, degrees=(2,), recompute="full", compile="aot_eager"
    ),
}


def build(frozen: tuple[str, ...] = ()) -> STDiT3:
    """The same model every time, in which every parameter has a part in the output."""
    generator = torch.Generator().manual_seed(0)
    model = STDiT3(MODEL, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rope.freqs":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    freeze(model, frozen)
    return model


def loss_of(model: nn.Module, number: int) -> Tensor:
    """The loss of a micro-batch; each has another size and other lengths of texts."""
    generator = torch.Generator().manual_seed(number)
    clips, frames, width = 1 + number % 2, 2 + number % 3, 4 + 2 * (number % 2)
    x = torch.randn(clips, 4, frames, 4, width, generator=generator)
    x_mask = torch.ones(clips, frames, dtype=torch.bool)
    x_mask[0, 0] = number % 3 > 0
    out: Tensor = model(
        x,
        1000 * torch.rand(clips, generator=generator),
        torch.randn(clips, 1, 6, 8, generator=generator),
        mask=torch.arange(6) < torch.tensor([[2 + number % 4]] * (clips - 1) + [[6]]),
        x_mask=x_mask,
        fps=torch.tensor([24.0]),
        height=torch.full((clips,), 32.0),
        width=torch.full((clips,), 8.0 * width),
    )
    return (out - torch.randn(out.shape, generator=generator)).square().mean()


@dataclass(frozen=True)
class Step:
    """What one step makes: all tensors whole, float32, on the CPU."""

    losses: list[float]
    """Of the micro-batches."""
    norm: float
    """Of all gradients, before clipping."""
    grads: dict[str, Tensor]
    """After clipping."""
    weights: dict[str, Tensor]
    average: dict[str, Tensor]


def reference_step(precision: str, micro_batches: int, frozen: tuple[str, ...]) -> Step:
    """The step in plain PyTorch, in one process, on a model in half precision where asked for."""
    masters, scale = build(frozen), LOSS_SCALE if precision == "fp16" else 1.0
    trained = {n: p for n, p in masters.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in trained.items()}
    losses = []
    model = build(frozen).to(DTYPES[precision])
    for number in range(micro_batches):
        model.zero_grad()
        loss = loss_of(model, number)
        (loss * scale / micro_batches).backward()
        losses.append(float(loss.detach()))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                sums[name] += parameter.grad.float() / scale
    norm = torch.stack([g.square().sum() for g in sums.values()]).sum().sqrt()
    for name, parameter in trained.items():
        parameter.grad = sums[name] * (CLIP / (norm + 1e-6)).clamp(max=1.0)
    before = {n: p.detach().clone() for n, p in masters.state_dict().items()}
    torch.optim.AdamW(trained.values(), lr=LR, eps=EPS, weight_decay=0.01).step()
    weights = {n: p.detach().clone() for n, p in masters.state_dict().items()}
    average = {n: before[n] * DECAY + weights[n] * (1 - DECAY) for n in weights}
    grads = {n: p.grad for n, p in trained.items() if p.grad is not None}
    return Step(losses, float(norm), grads, weights, average)


def differences(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> list[str]:
    """Tensors that differ by more than so much of their length, by name."""
    assert got.keys() == want.keys()
    found = []
    for name, expected in want.items():
        off = float((got[name] - expected).norm())
        if not off <= tolerance * float(expected.norm()):
            found.append(f"{name}: off by {off:.3g} of {float(expected.norm()):.3g}")
    return found
