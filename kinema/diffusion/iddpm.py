"""Improved DDPM as in Open-Sora 1.0 and 1.1, DiT, Latte and PixArt, without a network.

Formulas: Ho et al., "Denoising Diffusion Probabilistic Models" (2020); the learned variance and
its loss: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from kinema.diffusion.config import IDDPMConfig
from kinema.diffusion.noise_schedule import NoiseSchedule, respaced
from kinema.diffusion.process import Network, NoiseOfStep, guided


class IDDPM:
    """Noise in whole steps.

    Timesteps t are whole numbers from 0 to `num_timesteps` - 1 (nearly pure noise);
    `x_t = sqrt(a_t)·x0 + sqrt(1 - a_t)·noise`. The network predicts the noise in its first C
    channels and, in C more, where the variance of a step lies between its bounds: -1 is the
    posterior's variance, 1 is beta, in logarithms.

    Shapes: clips and noise `[B, C, T, H, W]` (latents), predictions `[B, 2C, T, H, W]`,
    timesteps `[B]`, frame masks bool `[B, T]`, True = noised. All arithmetic is float32 whatever
    comes in.
    """

    terms: tuple[str, ...] = ("mse", "vb")

    def __init__(self, config: IDDPMConfig) -> None:
        self.config = config

    # Timesteps

    def draw(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """The raw draws for `training_timesteps`: uniform in [0, 1), float32 `[B]` on the
        generator's device."""
        return torch.rand(batch_size, generator=generator, device=generator.device)

    def training_timesteps(
        self,
        draws: Tensor,
        *,
        latent_frames: Tensor | int,
        height: Tensor | int,
        width: Tensor | int,
    ) -> Tensor:
        """Whole timesteps, each as likely as any other, from raw draws; sizes do not matter.

        Returns:
            float32 `[B]` in [0, num_timesteps - 1].
        """
        n = self.config.num_timesteps
        return (draws.float() * n).floor().clamp(max=n - 1)

    def sampling_timesteps(
        self, steps: int, *, latent_frames: Tensor, height: Tensor, width: Tensor
    ) -> Tensor:
        """Whole timesteps at equal distances from the last to 0, float32 `[steps, B]`.

        Raises:
            KinemaError: more steps than there are timesteps.
        """
        visited = respaced(self.config.num_timesteps, str(steps))
        t = torch.tensor(visited[::-1], dtype=torch.float32, device=height.device)
        return t[:, None].expand(steps, len(height))

    # Training

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        """`x_t`, float32; frames where `mask` is False are noised to t = 0, not quite clean."""
        schedule, index = self._full_schedule(t.device), t.long()
        x0, noise = x0.float(), noise.float()
        x_t = _noised(schedule, index, x0, noise)
        if mask is None:
            return x_t
        least = _noised(schedule, torch.zeros_like(index), x0, noise)
        return torch.where(_per_frame(mask), x_t, least)

    def loss(
        self,
        prediction: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The sum of `loss_terms`, float32 `[B]`."""
        found = self.loss_terms(prediction, x0, noise, t, mask=mask, weight=weight)
        return found["mse"] + found["vb"]

    def loss_terms(
        self,
        prediction: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What the loss of each sample is made of, float32 `[B]` each.

        `mse`: squared error of the noise. `vb`: the term of the variational bound at t, in bits
        per element; only the variance learns from it, the noise is taken as it is. (The originals'
        `LossType.MSE` with `LEARNED_RANGE`: neither is rescaled.)

        Args:
            prediction: `[B, 2C, T, H, W]`.
            t: whole timesteps.
            mask: frames that count (True); a sample without any has loss 0.
            weight: `[B]`, factor of each sample's squared error, chosen by its timestep.
        """
        epsilon, variance = _split(prediction, x0.shape[1])
        x0, noise = x0.float(), noise.float()
        mse = _mean((epsilon - noise).square(), mask)
        if weight is not None:
            mse = mse * weight.float()
        return {"mse": mse, "vb": self._bound(epsilon.detach(), variance, x0, noise, t, mask)}

    def _bound(
        self,
        epsilon: Tensor,
        variance: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Divergence of the network's step from the true posterior; at t = 0, where the step is
        the last, how unlikely it makes the clip."""
        schedule, index = self._full_schedule(t.device), t.long()
        x_t = _noised(schedule, index, x0, noise)
        true_mean = _posterior_mean(schedule, index, x0, x_t)
        true_log_variance = _at(schedule.posterior_log_variance_clipped, index)
        mean, log_variance = _step(schedule, index, x_t, epsilon, variance)
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            - 1.0
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        nats = torch.where(
            t == 0,
            _mean(-_log_likelihood(x0, mean, 0.5 * log_variance), mask),
            _mean(divergence, mask),
        )
        return nats / math.log(2.0)

    # Sampling

    def guided(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Guidance of the noise, or of its first `cfg_channel` channels; all other channels,
        the variance among them, are those of `cond`."""
        channels = self.config.cfg_channel or cond.shape[1] // 2
        first = guided(cond[:, :channels], uncond[:, :channels], scale)
        return torch.cat([first, cond[:, channels:].float()], dim=1)

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
        """Ancestral sampling: each step draws from what the network says of the one before.

        Args:
            network: see the class.
            z: `[B, C, T, H, W]`: noise, or, with a mask, clean latents where the mask is below 1.
            timesteps: `[steps, B]` from `sampling_timesteps`, the same for all samples.
            mask: float `[B, T]` in [0, 1]: 1 generates a frame, 0 keeps it, a value between
                keeps it until that share of the steps is left, then noises it and generates
                from there. The network gets `x_mask`: True where a frame is being generated,
                but, as in 1.1, from the step after a frame was noised on.
            noise: of step i is `noise(i)`; a mask draws `noise(steps + i)` besides, to noise
                frames.
            on_step: called with the number of finished steps.

        Returns:
            float32 `[B, C, T, H, W]`.
        """
        assert noise is not None, "every step but the last draws noise"
        z, steps = z.float(), len(timesteps)
        visited = tuple(int(t) for t in timesteps[:, 0].tolist()[::-1])
        schedule = self._schedule(visited, z.device)
        # The step, counted down to 0, that a frame is noised before; above all for noise.
        begins = None if mask is None else (mask.float() * steps).int()
        # Asked of the device once, not in every step.
        begun = set() if begins is None else set(begins.flatten().tolist())
        x, x_mask = z, None
        for step, t in enumerate(timesteps):
            left = steps - 1 - step
            index = torch.full((len(z),), left, device=z.device)
            if begins is not None:
                x_mask, fresh = begins > left, begins == left
                x = z
                if left in begun:
                    x = torch.where(
                        _per_frame(fresh), _noised(schedule, index, z, noise(steps + step)), z
                    )
            epsilon, variance = _split(network(x, t, x_mask), z.shape[1])
            moved, log_variance = _step(schedule, index, x, epsilon, variance)
            if left:
                moved = moved + (0.5 * log_variance).exp() * noise(step).float()
            if mask is None or begins is None:
                x = z = moved
            else:
                # 1.1 runs the last step on kept frames too, so that they come out a little off.
                z = torch.where(_per_frame((begins >= left) & (mask > 0)), moved, z)
            if on_step is not None:
                on_step(step + 1)
        return z

    def _full_schedule(self, device: torch.device) -> NoiseSchedule:
        return self._schedule(tuple(range(self.config.num_timesteps)), device)

    def _schedule(self, timesteps: tuple[int, ...], device: torch.device) -> NoiseSchedule:
        tables = {"float32": torch.float32, "float64": torch.float64}[self.config.tables]
        return _make_schedule(self.config.num_timesteps, timesteps, tables, device)


_make_schedule = functools.lru_cache(maxsize=8)(NoiseSchedule.linear)


def _at(table: Tensor, index: Tensor) -> Tensor:
    """Values of a table, `[B, 1, 1, 1, 1]`."""
    return table[index].view(-1, 1, 1, 1, 1)


def _noised(schedule: NoiseSchedule, index: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return (
        _at(schedule.sqrt_alphas_cumprod, index) * x0
        + _at(schedule.sqrt_one_minus_alphas_cumprod, index) * noise.float()
    )


def _posterior_mean(schedule: NoiseSchedule, index: Tensor, x0: Tensor, x_t: Tensor) -> Tensor:
    return (
        _at(schedule.posterior_mean_coef1, index) * x0
        + _at(schedule.posterior_mean_coef2, index) * x_t
    )


def _step(
    schedule: NoiseSchedule, index: Tensor, x_t: Tensor, epsilon: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and log variance of `x_{t-1}` as the network has it."""
    x0 = (
        _at(schedule.sqrt_recip_alphas_cumprod, index) * x_t
        - _at(schedule.sqrt_recipm1_alphas_cumprod, index) * epsilon
    )
    share = (variance + 1.0) / 2.0
    most, least = (
        _at(schedule.log_betas, index),
        _at(schedule.posterior_log_variance_clipped, index),
    )
    return _posterior_mean(schedule, index, x0, x_t), share * most + (1.0 - share) * least


def _log_likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log of the probability that a normal value falls into x's bin, of 255 from -1 to 1.

    Made for pixels; the originals use it on latents all the same. The outermost bins reach to
    infinity. The normal distribution is approximated by a tanh (error below 1e-3).
    """
    centred, inverse = x - mean, (-log_deviation).exp()
    below = _normal_cdf(inverse * (centred + 1.0 / 255.0))
    above = _normal_cdf(inverse * (centred - 1.0 / 255.0))
    probability = torch.where(x < -0.999, below, torch.where(x > 0.999, 1.0 - above, below - above))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


def _mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each sample over the frames that count, `[B]`."""
    of_frame = error.mean(dim=(1, 3, 4))
    if mask is None:
        return of_frame.mean(dim=1)
    # where, not times: a clean frame's error may be inf and must not become NaN.
    return torch.where(mask, of_frame, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _split(prediction: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Noise and variance, float32."""
    assert prediction.shape[1] == 2 * channels, "the network must predict a variance"
    epsilon, variance = prediction.float().split(channels, dim=1)
    return epsilon, variance


def _per_frame(mask: Tensor) -> Tensor:
    return mask[:, None, :, None, None]
