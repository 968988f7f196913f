"""What training and generation know of an autoencoder, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from kinema.models.config import VAEConfig


class Autoencoder(nn.Module, ABC):
    """Videos to normalised latents and back."""

    config: VAEConfig

    @abstractmethod
    def encode(self, video: Tensor, *, noise: torch.Generator | None = None) -> Tensor:
        """Normalised latents.

        Args:
            video: `[B, 3, T, H, W]` in [-1, 1].
            noise: draws from the posterior; None takes its mean.

        Returns:
            `[B, C, t, h, w]`.
        """

    @abstractmethod
    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """Video of normalised latents, `[B, 3, num_frames, H, W]`, in [-1, 1] but for overshoot."""
