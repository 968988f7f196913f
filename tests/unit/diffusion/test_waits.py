"""Sampling asks the device for values before its first step only: each question is a wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kinema.diffusion.config import IDDPMConfig, ProcessConfig, RectifiedFlowConfig
from kinema.diffusion.process import build_process
from tests.unit.device_waits import Questions

STEPS = 6


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
