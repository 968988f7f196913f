"""DPM-Solver++: clips from a network trained by IDDPM in some twenty steps.

Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models"
(2022): the multistep solver of second order, algorithm 2, with times at equal distances.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.diffusion.iddpm import IDDPM
from kinema.diffusion.noise_schedule import linear_betas
from kinema.diffusion.process import Network, NoiseOfStep, guided

FIRST_ORDER_END_BELOW = 10
"""With fewer steps than this the last one is of first order, which is steadier."""


@dataclass(frozen=True)
class ContinuousSchedule:
    """IDDPM's schedule between its whole timesteps: `x = alpha·x0 + sigma·noise` at time s.

    s runs from `1 / num_timesteps` (timestep 0) to 1 (the last); log alpha is linear between.
    """

    num_timesteps: int

    def timestep(self, s: Tensor) -> Tensor:
        """What the network is told: need not be whole."""
        return (s - 1.0 / self.num_timesteps) * self.num_timesteps

    def time(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep`."""
        return (timestep + 1.0) / self.num_timesteps

    def log_alpha(self, s: Tensor) -> Tensor:
        """float64, shape of `s`."""
        table = _log_alphas(self.num_timesteps).to(s.device)
        place = (s.double() * self.num_timesteps - 1.0).clamp(0, self.num_timesteps - 1)
        low = place.floor().long().clamp(max=self.num_timesteps - 2)
        return torch.lerp(table[low], table[low + 1], place - low)

    def alpha(self, s: Tensor) -> Tensor:
        """Factor of the clip."""
        return self.log_alpha(s).exp()

    def sigma(self, s: Tensor) -> Tensor:
        """Factor of the noise."""
        return (-torch.expm1(2.0 * self.log_alpha(s))).sqrt()

    def lambda_(self, s: Tensor) -> Tensor:
        """`log(alpha / sigma)`: half the logarithm of the signal-to-noise ratio."""
        return self.log_alpha(s) - self.sigma(s).log()


@functools.lru_cache(maxsize=8)
def _log_alphas(num_timesteps: int) -> Tensor:
    # 1 - beta in float32, as the original has it: near the clip that moves lambda by 1e-4.
    return 0.5 * (1.0 - linear_betas(num_timesteps).float()).double().log().cumsum(0)


class DPMSolver(IDDPM):
    """IDDPM sampled by DPM-Solver++; training is the same. Nothing is drawn on the way, and no
    frame can be kept."""

    def sampling_timesteps(
        self, steps: int, *, latent_frames: Tensor, height: Tensor, width: Tensor
    ) -> Tensor:
        """Timesteps at equal distances from the last down, the last step ending at 0: float32
        `[steps, B]`, not whole."""
        n = self.config.num_timesteps
        schedule = ContinuousSchedule(n)
        times = torch.linspace(1.0, 1.0 / n, steps + 1, dtype=torch.float64)[:-1]
        t = schedule.timestep(times).float().to(height.device)
        return t[:, None].expand(steps, len(height))

    def guided(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Guidance of all channels: `cfg_channel` belongs to the other sampler."""
        return guided(cond, uncond, scale)

    def sample(
        self,
        network: Network,
        z: Tensor,
        timesteps: Tensor,
        *,
        mask: Tensor | None = None,
        noise: NoiseOfStep | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """From noise to a clip; arguments as for `IDDPM.sample`, `noise` is not asked for.

        Raises:
            KinemaError: with a mask.
        """
        if mask is not None:
            raise KinemaError(
                "DPM-Solver cannot keep frames, so it takes no references",
                where="diffusion.sampler",
                hint="sampler: iddpm",
            )
        z, steps = z.float(), len(timesteps)
        schedule = ContinuousSchedule(self.config.num_timesteps)
        # float64: lambdas of neighbours are subtracted. All samples have the same times.
        times = schedule.time(timesteps[:, 0].double().cpu())
        times = torch.cat([times, times.new_tensor([1.0 / self.config.num_timesteps])])
        alpha, sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
        lambdas = schedule.lambda_(times).tolist()
        before: Tensor | None = None  # the clip that the step before predicted
        for step, t in enumerate(timesteps):
            epsilon = network(z, t, None)[:, : z.shape[1]].float()
            clip = (z - sigma[step] * epsilon) / alpha[step]
            h = lambdas[step + 1] - lambdas[step]
            towards = clip
            if before is not None and not self._first_order(step, steps):
                ratio = (lambdas[step] - lambdas[step - 1]) / h
                towards = clip + (clip - before) / (2.0 * ratio)
            z = sigma[step + 1] / sigma[step] * z - alpha[step + 1] * math.expm1(-h) * towards
            before = clip
            if on_step is not None:
                on_step(step + 1)
        return z

    @staticmethod
    def _first_order(step: int, steps: int) -> bool:
        return steps < FIRST_ORDER_END_BELOW and step == steps - 1
