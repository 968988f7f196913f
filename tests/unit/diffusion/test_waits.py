"""Sampling asks the device for values before its first step only: each question is a wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.diffusion.config import IDDPMConfig, ProcessConfig, RectifiedFlowConfig
from kinema.diffusion.process import build_process

aten = torch.ops.aten
QUESTIONS = (
    aten._local_scalar_dense.default,  # item(), float(), bool()
    aten.nonzero.default,
    aten.equal.default,
)
STEPS = 6


class Questions(TorchDispatchMode):
    """Counts operators whose result the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.count += func in QUESTIONS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "masked"),
    [
        (RectifiedFlowConfig(use_timestep_transform=True), True),
        (IDDPMConfig(), True),
        (IDDPMConfig(sampler="dpm-solver"), False),
    ],
)
def test_steps_ask_nothing(config: ProcessConfig, masked: bool) -> None:
    process, rows = build_process(config), torch.full((2,), 32.0)
    asked: list[int] = []

    def network(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        assert (x_mask is not None) == masked
        return torch.cat([x, x], dim=1)

    with Questions() as questions:
        assert bool(rows[0])
        assert questions.count, "the counter does not count"
        process.sample(
            network,
            torch.randn(2, 4, 3, 2, 2),
            process.sampling_timesteps(STEPS, latent_frames=rows, height=rows, width=rows),
            mask=torch.tensor([[1.0, 0.0, 0.5], [0.25, 1.0, 1.0]]) if masked else None,
            noise=lambda number: torch.randn(2, 4, 3, 2, 2),
            on_step=lambda step: asked.append(questions.count),
        )
    assert asked == [asked[0]] * STEPS
