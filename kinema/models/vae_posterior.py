"""The distribution an autoencoder's encoder gives out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class DiagonalGaussian:
    """A normal distribution per latent value, without correlations.

    Attributes:
        mean: float32 `[B, C, ...]`.
        logvar: float32, same shape; logarithm of the variance, clamped to [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """From `[B, 2C, ...]`: means, then log-variances. In float32, for exp and the KL sum."""
        mean, logvar = moments.float().chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    def sample(self, noise: Tensor | None) -> Tensor:
        """`mean + std * noise`, with standard normal noise of the mean's shape; None: the mean."""
        if noise is None:
            return self.mean
        return self.mean + self.std * noise.to(self.mean)

    def scaled(self, shift: Tensor | float, factor: Tensor | float) -> DiagonalGaussian:
        """The distribution of `(x - shift) * factor`."""
        logvar = self.logvar + 2 * torch.as_tensor(factor).abs().log().to(self.logvar)
        return DiagonalGaussian((self.mean - shift) * factor, logvar)

    @property
    def std(self) -> Tensor:
        """Standard deviation, float32, of the mean's shape."""
        return torch.exp(0.5 * self.logvar)

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, summed over each sample: `[B]`, in nats.

        `0.5 * sum(mean^2 + var - 1 - logvar)`.
        """
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)
