"""Stable Diffusion's image autoencoder on videos, every frame for itself.

What Open-Sora 1.0 and 1.1 (`VideoAutoencoderKL`), DiT, Latte and PixArt use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kinema.models.autoencoder import Autoencoder, VideoPart, check_video
from kinema.models.config import ImageVAEConfig
from kinema.models.vae_2d import AutoencoderKL
from kinema.models.vae_posterior import DiagonalGaussian


class ImageVAE(Autoencoder, AutoencoderKL):
    """Videos `[B, 3, T, H, W]` in [-1, 1] to latents `[B, C, T, h, w]` and back.

    Frames know nothing of each other. Parameters have the names of diffusers' `AutoencoderKL`, so
    that files like `sd-vae-ft-ema` load as they are. With weights in bf16 or fp16 the posterior and
    the scaling are still computed in float32. In fp16 SDXL's own weights overflow; bf16 has the
    range.
    """

    config: ImageVAEConfig

    def __init__(self, config: ImageVAEConfig) -> None:
        AutoencoderKL.__init__(self, config.vae_2d)
        self.config = config

    def chunks(self, num_frames: int) -> Iterator[tuple[slice, slice]]:
        """See `Autoencoder.chunks`: every frame."""
        for frame in range(num_frames):
            yield slice(frame, frame + 1), slice(frame, frame + 1)

    def encode_parts(
        self,
        video: Tensor,
        parts: Sequence[VideoPart],
        *,
        noise: Tensor | torch.Generator | None = None,
    ) -> list[Tensor]:
        """See `Autoencoder.encode_parts`; latents times `scaling_factor`.

        Args:
            noise: standard normal, `[B, C, T, h, w]`, or the generator that draws it.
        """
        check_video(video, self.config)
        if isinstance(noise, torch.Generator):
            size = self.config.latent_size(*video.shape[2:])
            shape = (video.shape[0], self.config.latent_channels, *size)
            noise = torch.randn(shape, generator=noise, device=noise.device).to(video.device)
        found = []
        for clips, frames, _ in parts:
            pixels = video[clips, :, frames]
            moments = self.encode_video(pixels, self.config.micro_batch_size, self.tiling)
            drawn = DiagonalGaussian.from_moments(moments).sample(
                None if noise is None else noise[clips, :, frames]
            )
            found.append(drawn * self.config.scaling_factor)
        return found

    def posterior(self, video: Tensor) -> DiagonalGaussian:
        """See `Autoencoder.posterior`."""
        check_video(video, self.config)
        moments = self.encode_video(video, self.config.micro_batch_size, self.tiling)
        return DiagonalGaussian.from_moments(moments).scaled(0.0, self.config.scaling_factor)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """The video of latents, about in [-1, 1].

        Args:
            z: `[B, C, num_frames, h, w]`.

        Returns:
            `[B, 3, num_frames, h * stride, w * stride]` in the dtype of the weights.
        """
        assert z.shape[2] == num_frames, (
            f"{num_frames} frames have as many latent frames, not {z.shape[2]}"
        )
        # Divided in float32: the latents' own dtype may be a short one.
        z = z.float() / self.config.scaling_factor
        return self.decode_video(z, self.config.micro_batch_size, self.tiling)
