"""DPM-Solver++: order of accuracy, times, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.diffusion.config import IDDPMConfig
from kinema.diffusion.dpm_solver import ContinuousSchedule, DPMSolver
from kinema.diffusion.iddpm import IDDPM
from kinema.diffusion.noise_schedule import NoiseSchedule
from kinema.diffusion.process import build_process

CONFIG = IDDPMConfig(sampler="dpm-solver")


def times(steps: int) -> Tensor:
    rows = torch.ones(1)
    return DPMSolver(CONFIG).sampling_timesteps(steps, latent_frames=rows, height=rows, width=rows)


def test_the_sampler_is_a_setting() -> None:
    assert type(build_process(IDDPMConfig())) is IDDPM
    assert (
        type(build_process(dataclasses.replace(IDDPMConfig(), sampler="dpm-solver"))) is DPMSolver
    )


def test_times_go_down_evenly_from_the_last_timestep() -> None:
    t = times(4)[:, 0]
    assert t.tolist() == pytest.approx([999.0, 749.25, 499.5, 249.75])


def test_between_whole_timesteps_log_alpha_is_linear() -> None:
    schedule = ContinuousSchedule(1000)
    whole = NoiseSchedule.linear(1000, range(1000))
    s = schedule.time(torch.arange(1000, dtype=torch.float64))
    torch.testing.assert_close(
        schedule.alpha(s).float(), whole.sqrt_alphas_cumprod, rtol=1e-5, atol=0
    )
    middle = schedule.time(torch.tensor([9.5], dtype=torch.float64))
    ends = schedule.log_alpha(schedule.time(torch.tensor([9.0, 10.0], dtype=torch.float64)))
    assert float(schedule.log_alpha(middle)) == pytest.approx(float(ends.mean()), rel=1e-9)


def test_halving_the_steps_costs_as_second_order_does() -> None:
    """Clips with deviation 0.5: the exact network, whose path is known."""
    schedule = ContinuousSchedule(1000)

    def network(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        s = schedule.time(t.double())
        a, b = schedule.alpha(s), schedule.sigma(s)
        factor = (b / (0.25 * a * a + b * b)).float().view(-1, 1, 1, 1, 1)
        return torch.cat([factor * x, torch.zeros_like(x)], dim=1)

    def end(steps: int) -> float:
        z = torch.ones(1, 4, 1, 2, 2)
        return float(DPMSolver(CONFIG).sample(network, z, times(steps))[0, 0, 0, 0, 0])

    s = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    a, b = schedule.alpha(s), schedule.sigma(s)
    spread = (0.25 * a * a + b * b).sqrt()  # the path keeps x / spread
    exact = float(spread[1] / spread[0])
    coarse, fine = abs(end(100) - exact), abs(end(200) - exact)
    assert coarse < 1e-2
    assert 3 < coarse / fine < 5


def test_a_mask_is_refused_with_the_way_out() -> None:
    with pytest.raises(KinemaError, match="sampler: iddpm"):
        DPMSolver(CONFIG).sample(
            lambda x, t, x_mask: torch.cat([x, x], dim=1),
            torch.zeros(1, 4, 2, 2, 2),
            times(2),
            mask=torch.ones(1, 2),
        )


def test_guidance_is_of_all_channels_whatever_the_other_sampler_guides() -> None:
    process = DPMSolver(dataclasses.replace(CONFIG, cfg_channel=3))
    cond, uncond = torch.ones(1, 8, 1, 2, 2), torch.zeros(1, 8, 1, 2, 2)
    assert process.guided(cond, uncond, 3.0).unique().tolist() == [3.0]
