"""What training and generation know of an autoencoder, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.config import Tiling, VAEConfig


class Autoencoder(nn.Module, ABC):
    """Videos to normalised latents and back."""

    config: VAEConfig
    tiling: Tiling | None = None
    """Set it when memory is short; it does not change what comes out."""

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


def check_video(video: Tensor, config: VAEConfig) -> None:
    """Whether an autoencoder can encode `[B, 3, T, H, W]`.

    Raises:
        KinemaError: the frames are smaller than one latent position.
    """
    assert video.ndim == 5, f"a video is [B, 3, T, H, W], not {tuple(video.shape)}"
    assert video.shape[1] == 3, f"a video is [B, 3, T, H, W], not {tuple(video.shape)}"
    height, width = video.shape[3:]
    stride = config.spatial_stride
    if min(height, width) < stride:
        raise KinemaError(
            f"frames of {width}x{height} are smaller than one latent position, "
            f"{stride}x{stride} pixels",
            where="autoencoder",
            hint=f"frames of at least {stride}x{stride}",
        )
