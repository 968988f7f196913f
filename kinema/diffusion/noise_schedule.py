"""The noise schedule of IDDPM: which timesteps, and how much noise at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kinema.config.errors import KinemaError


def linear_betas(num_timesteps: int) -> Tensor:
    """Variance that each step adds, float64 `[num_timesteps]`.

    From 1e-4 to 0.02 for 1000 steps (Ho et al., 2020), scaled so that any number of steps adds
    as much noise in all. Fewer than 21 steps would need a variance above 1.
    """
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def respaced(num_timesteps: int, spacing: str) -> list[int]:
    """Timesteps that sampling visits, ascending.

    Args:
        spacing: `"100"`: so many, from the first to the last. `"10,15,20"`: so many in each of
            equal sections. `"ddim25"`: so many at one whole stride from 0 on (Song et al., 2021).

    Raises:
        KinemaError: there are not so many timesteps, or no whole stride gives that number.
    """
    if spacing.startswith("ddim"):
        wanted = int(spacing.removeprefix("ddim"))
        for stride in range(1, num_timesteps):
            if len(range(0, num_timesteps, stride)) == wanted:
                return list(range(0, num_timesteps, stride))
        raise KinemaError(
            f"no whole stride through {num_timesteps} timesteps gives {wanted} of them",
            where=f"timesteps {spacing!r}",
            hint=f"give the number alone: {wanted}",
        )
    counts = [int(count) for count in spacing.split(",")]
    size, longer = divmod(num_timesteps, len(counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer)
        if not 1 <= count <= length:
            raise KinemaError(
                f"{count} of {length} timesteps cannot be visited",
                where=f"timesteps {spacing!r}",
                hint=f"from 1 to {length}",
            )
        gap = (length - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            timesteps.append(start + round(place))
            place += gap  # as the originals add it up: its rounding decides in a tie
        start += length
    return timesteps


@dataclass(frozen=True)
class NoiseSchedule:
    """What a step of the chain needs to know, float32 `[steps]` each.

    With `a` the product of `1 - beta` up to a step: `x_t = sqrt(a)·x0 + sqrt(1 - a)·noise`, and
    the posterior `q(x_{t-1} | x_t, x0)` is normal (Ho et al., 2020, equations 4 and 7).
    """

    timesteps: Tensor
    """int64, ascending: what the network is told."""
    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    """Factor of the clip in `x_t`."""
    sqrt_one_minus_alphas_cumprod: Tensor
    """Factor of the noise in `x_t`."""
    sqrt_recip_alphas_cumprod: Tensor
    """`x0 = this·x_t - sqrt_recipm1_alphas_cumprod·noise`."""
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_coef1: Tensor
    """Factor of x0 in the posterior's mean."""
    posterior_mean_coef2: Tensor
    """Factor of `x_t` in the posterior's mean."""
    posterior_log_variance_clipped: Tensor
    """Log of the posterior's variance, the least that the network may choose. The first step's
    variance is 0 and stands for the second's."""
    log_betas: Tensor
    """The most that the network may choose."""

    @classmethod
    def linear(
        cls,
        num_timesteps: int,
        timesteps: Sequence[int],
        tables: torch.dtype = torch.float64,
        device: torch.device | None = None,
    ) -> Self:
        """The linear schedule, seen at some of its timesteps only (`respaced`).

        Args:
            timesteps: ascending.
            tables: float64; float32 as 1.1 and 1.2 work, which round the betas and go on in
                float32: up to 2e-4 off.
            device: where the tables go; they are made on the CPU, the same everywhere.
        """
        visited = torch.tensor(timesteps, dtype=torch.int64)
        product = (1.0 - linear_betas(num_timesteps)).cumprod(0)[visited]
        betas = (1.0 - product / _before(product)).to(tables)

        alphas = 1.0 - betas
        product = alphas.cumprod(0)
        before = _before(product)
        variance = betas * (1.0 - before) / (1.0 - product)
        # With a single step, which adds no noise, any number does.
        second = variance[1:2] if len(variance) > 1 else betas[:1]
        found = {
            "betas": betas,
            "alphas_cumprod": product,
            "sqrt_alphas_cumprod": product.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1.0 - product).sqrt(),
            "sqrt_recip_alphas_cumprod": (1.0 / product).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1.0 / product - 1.0).sqrt(),
            "posterior_mean_coef1": betas * before.sqrt() / (1.0 - product),
            "posterior_mean_coef2": (1.0 - before) * alphas.sqrt() / (1.0 - product),
            "posterior_log_variance_clipped": torch.cat([second, variance[1:]]).log(),
            "log_betas": betas.log(),
        }
        tensors = {name: value.float().to(device) for name, value in found.items()}
        return cls(timesteps=visited.to(device), **tensors)


def _before(product: Tensor) -> Tensor:
    """The product one step earlier; 1 before the first."""
    return torch.cat([torch.ones_like(product[:1]), product[:-1]])
