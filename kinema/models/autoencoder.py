"""What training and generation know of an autoencoder, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.config import Tiling, VAEConfig
from kinema.models.vae_posterior import DiagonalGaussian


class VideoPart(NamedTuple):
    """Some clips' frames that can be encoded without the others."""

    clips: slice
    frames: slice
    """From where a chunk begins to where one ends, see `Autoencoder.chunks`."""
    latent_frames: slice
    """What they become."""


class Autoencoder(nn.Module, ABC):
    """Videos to normalised latents and back."""

    config: VAEConfig
    tiling: Tiling | None = None
    """Set it when memory is short; it does not change what comes out."""

    @abstractmethod
    def chunks(self, num_frames: int) -> Iterator[tuple[slice, slice]]:
        """The shortest runs of frames that know nothing of the others, and their latent frames."""

    @abstractmethod
    def encode_parts(
        self, video: Tensor, parts: Sequence[VideoPart], *, noise: Any = None
    ) -> list[Tensor]:
        """What `encode` gives of some parts alone, as if the whole had been encoded.

        Args:
            video: `[B, 3, T, H, W]` in [-1, 1], all of it.
            noise: as for `encode`, of the whole.

        Returns:
            float32 `[clips, C, latent frames, h, w]` for each part.

        Raises:
            KinemaError: the frames are smaller than one latent position.
        """

    def encode(self, video: Tensor, *, noise: Any = None) -> Tensor:
        """Normalised latents.

        Args:
            video: `[B, 3, T, H, W]` in [-1, 1], any floating-point dtype.
            noise: draws from the posterior: a generator (on the generator's device, in float32),
                or noise as the class takes it. None takes the posterior's mean.

        Returns:
            float32 `[B, C, t, h, w]`.

        Raises:
            KinemaError: the frames are smaller than one latent position.
        """
        count, frames = len(video), video.shape[2]
        latent_frames = self.config.latent_size(frames, *video.shape[3:5])[0]
        whole = VideoPart(slice(0, count), slice(0, frames), slice(0, latent_frames))
        (latents,) = self.encode_parts(video, [whole], noise=noise)
        return latents

    @abstractmethod
    def posterior(self, video: Tensor) -> DiagonalGaussian:
        """Distribution of the normalised latents, float32 `[B, C, t, h, w]`, of a video
        `[B, 3, T, H, W]`; where one stage follows another, of the last, given the means before.

        Raises:
            KinemaError: the frames are smaller than one latent position.
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
