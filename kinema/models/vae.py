"""The video autoencoder of Open-Sora 1.2: a 2D autoencoder per frame, then one over time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.autoencoder import Autoencoder, VideoPart, check_video
from kinema.models.config import Tiling, VAE2DConfig, VideoVAEConfig
from kinema.models.vae_2d import AutoencoderKL
from kinema.models.vae_posterior import DiagonalGaussian
from kinema.models.vae_temporal import TemporalVAE
from kinema.models.vae_tiling import in_parts

Noise = tuple[Tensor | None, Tensor | None]
"""Standard normal noise of the 2D posterior `[B, C, T, h, w]` and of the temporal one
`[B, C, t, h, w]`; None takes that posterior's mean."""


@dataclass(frozen=True)
class VAEOutput:
    """What training needs of one pass through the autoencoder.

    Attributes:
        video: the reconstruction, `[B, 3, T, H, W]`.
        z: sampled latents, *before* shift and scale, `[B, C, t, h, w]`.
        posterior: distribution of z; its KL is the one that trains the temporal part.
        spatial_latents: sampled and scaled 2D latents, `[B, C, T, h, w]`.
        spatial_latents_rec: the same as the temporal part gives them back.
        spatial_posterior: distribution of the 2D latents before their scaling.
    """

    video: Tensor
    z: Tensor
    posterior: DiagonalGaussian
    spatial_latents: Tensor
    spatial_latents_rec: Tensor
    spatial_posterior: DiagonalGaussian


class SpatialVAE(nn.Module):
    """The 2D autoencoder on every frame of a video, `micro_batch_size` frames at a time.

    Its latents are multiplied by `scaling`, whatever a published configuration file of the 2D
    weights says: the temporal part was trained so.
    """

    def __init__(
        self, config: VAE2DConfig, *, scaling: float, micro_batch_size: int | None
    ) -> None:
        super().__init__()
        self.module = AutoencoderKL(config)  # the released name
        self.scaling = scaling
        self.micro_batch_size = micro_batch_size

    def posterior(self, video: Tensor, tiling: Tiling | None = None) -> DiagonalGaussian:
        """Distribution of the unscaled latents, `[B, C, T, h, w]`, of `[B, 3, T, H, W]`."""
        moments = self.module.encode_video(video, self.micro_batch_size, tiling)
        return DiagonalGaussian.from_moments(moments)

    def encode(
        self, video: Tensor, noise: Tensor | None = None, tiling: Tiling | None = None
    ) -> Tensor:
        """Scaled latents, float32 `[B, C, T, h, w]`; without noise the posterior's mean."""
        return self.posterior(video, tiling).sample(noise) * self.scaling

    def decode(self, z: Tensor, tiling: Tiling | None = None) -> Tensor:
        """Scaled latents `[B, C, T, h, w]` to a video `[B, 3, T, H, W]`."""
        return self.module.decode_video(z / self.scaling, self.micro_batch_size, tiling)


class VideoVAE(Autoencoder):
    """Videos `[B, 3, T, H, W]` in [-1, 1] to latents `[B, C, t, h, w]` and back.

    A video is cut into chunks of `micro_frame_size` frames that know nothing of each other, so the
    memory of a call is that of one chunk plus its result. Nothing is drawn from global state: noise
    or a generator is handed in, and without either the posteriors' means are taken.
    """

    config: VideoVAEConfig
    shift: Tensor
    scale: Tensor

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_vae = SpatialVAE(
            config.vae_2d,
            scaling=config.spatial_scaling,
            micro_batch_size=config.micro_batch_size,
        )
        self.temporal_vae = TemporalVAE(config.vae_temporal, config.vae_2d.latent_channels)
        # Part of the released weights, so what was loaded counts, not what the settings say.
        self.register_buffer("scale", torch.tensor(config.scale).view(1, -1, 1, 1, 1))
        self.register_buffer("shift", torch.tensor(config.shift).view(1, -1, 1, 1, 1))

    def chunks(self, num_frames: int) -> Iterator[tuple[slice, slice]]:
        """See `Autoencoder.chunks`."""
        size = self.config.micro_frame_size or num_frames
        latent_start = 0
        for start in range(0, num_frames, size):
            stop = min(start + size, num_frames)
            latent_stop = latent_start + math.ceil((stop - start) / self.config.time_stride)
            yield slice(start, stop), slice(latent_start, latent_stop)
            latent_start = latent_stop

    def encode_parts(
        self,
        video: Tensor,
        parts: Sequence[VideoPart],
        *,
        noise: Noise | torch.Generator | None = None,
    ) -> list[Tensor]:
        """See `Autoencoder.encode_parts`."""
        spatial_noise, temporal_noise = self._noise(video, noise)
        found = []
        for clips, wanted, _ in parts:
            latents = []
            for frames, latent_frames in self.chunks(video.shape[2]):
                if wanted.start <= frames.start < wanted.stop:
                    noise_2d = _cut(spatial_noise, frames, clips)
                    x = self.spatial_vae.encode(video[clips, :, frames], noise_2d, self.tiling)
                    posterior = self._temporal_posterior(x)
                    latents.append(posterior.sample(_cut(temporal_noise, latent_frames, clips)))
            found.append((torch.cat(latents, dim=2) - self.shift) / self.scale)
        return found

    def posterior(self, video: Tensor) -> DiagonalGaussian:
        """See `Autoencoder.posterior`: the temporal one, given the mean of the 2D latents."""
        check_video(video, self.config)
        parts = []
        for frames, _ in self.chunks(video.shape[2]):
            x = self.spatial_vae.encode(video[:, :, frames], None, self.tiling)
            parts.append(self._temporal_posterior(x))
        return _join(parts).scaled(self.shift, 1 / self.scale)

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """The video of normalised latents, about in [-1, 1].

        Args:
            z: `[B, C, t, h, w]`, with t as `config.latent_size(num_frames, ...)` says.
            num_frames: frames of the video; t alone does not tell.

        Returns:
            `[B, 3, num_frames, h * stride, w * stride]` in the dtype of the weights.
        """
        parts = self._decode_chunks(z.float() * self.scale + self.shift, num_frames)
        video: Tensor | None = None
        for (frames, _), (part, _) in zip(self.chunks(num_frames), parts, strict=True):
            if video is None:  # one buffer for all: a list of parts would hold everything twice
                shape = list(part.shape)
                shape[2] = num_frames
                video = part.new_empty(shape)
            video[:, :, frames] = part
        assert video is not None
        return video

    def forward(self, video: Tensor, *, noise: Noise | torch.Generator | None = None) -> VAEOutput:
        """Encode and decode for training; arguments as for `encode`.

        Shift and scale play no part here: they are measured when training is done.
        """
        spatial_noise, temporal_noise = self._noise(video, noise)
        spatial_posteriors, posteriors, latents_2d, latents = [], [], [], []
        for frames, latent_frames in self.chunks(video.shape[2]):
            spatial_posteriors.append(self.spatial_vae.posterior(video[:, :, frames], self.tiling))
            x = spatial_posteriors[-1].sample(_cut(spatial_noise, frames))
            latents_2d.append(x * self.spatial_vae.scaling)
            posteriors.append(self._temporal_posterior(latents_2d[-1]))
            latents.append(posteriors[-1].sample(_cut(temporal_noise, latent_frames)))
        z = torch.cat(latents, dim=2)
        parts = list(self._decode_chunks(z, video.shape[2]))
        return VAEOutput(
            video=torch.cat([part for part, _ in parts], dim=2),
            z=z,
            posterior=_join(posteriors),
            spatial_latents=torch.cat(latents_2d, dim=2),
            spatial_latents_rec=torch.cat([x for _, x in parts], dim=2),
            spatial_posterior=_join(spatial_posteriors),
        )

    @torch.no_grad()
    def fit_normalisation(self, latents: Iterable[Tensor]) -> None:
        """Set shift and scale so that latents like these have zero mean and unit variance.

        Args:
            latents: batches as `encode` gives them (under the present shift and scale).

        Raises:
            KinemaError: no latents, or a channel that is constant or not finite.
        """
        count = 0
        total = torch.zeros(self.config.latent_channels, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for batch in latents:
            values = batch.detach().double().cpu().transpose(0, 1).flatten(1)
            count += values.shape[1]
            total += values.sum(1)
            squares += values.square().sum(1)
        if count == 0:
            raise KinemaError("no latents to measure shift and scale on", where="video VAE")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        for channel, value in enumerate(std.tolist()):
            if not math.isfinite(value) or value < 1e-6:
                raise KinemaError(
                    f"latent channel {channel} has standard deviation {value:.3g}: it carries "
                    "nothing, or training has gone wrong",
                    where="video VAE",
                    hint="train longer, or lower the weight of the KL term",
                )
        view = (1, -1, 1, 1, 1)
        self.shift += self.scale * mean.view(view).to(self.shift)
        self.scale *= std.view(view).to(self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Shift and scale stay float32 when the module is cast: rounding would bias latents."""
        exact = {"shift": self.shift, "scale": self.scale}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, value.to(moved.device))
        return self

    def _temporal_posterior(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.from_moments(self._over_time(self.temporal_vae.encode, x))

    def _decode_chunks(self, z: Tensor, num_frames: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Frames and 2D latents of each chunk, from latents before shift and scale."""
        chunks = list(self.chunks(num_frames))
        expected = chunks[-1][1].stop
        assert z.shape[2] == expected, (
            f"{num_frames} frames have {expected} latent frames, not {z.shape[2]}"
        )
        for frames, latent_frames in chunks:
            decode = partial(self.temporal_vae.decode, num_frames=frames.stop - frames.start)
            x = self._over_time(decode, z[:, :, latent_frames])
            yield self.spatial_vae.decode(x, self.tiling), x

    def _over_time(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        tiling = self.tiling
        size, rows = (1, tiling.rows) if tiling else (None, None)
        return in_parts(network, x.to(_dtype(self)), size=size, rows=rows)

    def _noise(self, video: Tensor, noise: Noise | torch.Generator | None) -> Noise:
        """Check the size and settle the noise, all at once so that chunks do not change it."""
        check_video(video, self.config)
        batch, _, frames, height, width = video.shape
        if not isinstance(noise, torch.Generator):
            return noise or (None, None)
        t, h, w = self.config.latent_size(frames, height, width)
        shapes = (
            (batch, self.config.vae_2d.latent_channels, frames, h, w),
            (batch, self.config.latent_channels, t, h, w),
        )
        spatial, temporal = (
            torch.randn(shape, generator=noise, device=noise.device).to(video.device)
            for shape in shapes
        )
        return spatial, temporal


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _cut(noise: Tensor | None, frames: slice, clips: slice = slice(None)) -> Tensor | None:
    return None if noise is None else noise[clips, :, frames]


def _join(parts: list[DiagonalGaussian]) -> DiagonalGaussian:
    mean = torch.cat([p.mean for p in parts], dim=2)
    return DiagonalGaussian(mean, torch.cat([p.logvar for p in parts], dim=2))
