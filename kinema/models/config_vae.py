"""Settings of the autoencoders, and the facts about them that others need without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from kinema.config.settings import settings
from kinema.models.config_types import LatentSize, PositiveInt
from kinema.models.vae_flops import (
    chunks,
    decode_2d,
    decode_temporal,
    encode_2d,
    encode_temporal,
)


@settings
class VAE2DConfig:
    """The image autoencoder inside a video autoencoder. The defaults are Stable Diffusion's."""

    block_out_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=5)] = (
        128,
        256,
        512,
        512,
    )
    """Channels of each level; every level after the first halves height and width."""
    layers_per_block: PositiveInt = 2
    latent_channels: PositiveInt = 4
    norm_num_groups: PositiveInt = 32

    def __post_init__(self) -> None:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {channels}, which is not a multiple of "
                    f"norm_num_groups {self.norm_num_groups}"
                )

    @property
    def stride(self) -> int:
        """Pixels per latent position, along height and along width."""
        return int(2 ** (len(self.block_out_channels) - 1))


@settings
class VAETemporalConfig:
    """The causal autoencoder over time that works on 2D latents. The defaults are as released."""

    filters: PositiveInt = 128
    channel_multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 2, 4)
    """Channels of each level, in units of `filters`."""
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """Which steps between levels halve the frames: one fewer than `channel_multipliers`."""
    num_res_blocks: PositiveInt = 4
    num_groups: PositiveInt = 32
    """Groups of the norms."""
    latent_embed_dim: PositiveInt = 4
    """Channels between the network and its last 1x1x1 convolution."""
    embed_dim: PositiveInt = 4
    """Channels of the latent."""

    def __post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ValueError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries; "
                f"{len(self.channel_multipliers)} channel_multipliers need one fewer than that"
            )
        for multiplier in self.channel_multipliers:
            if self.filters * multiplier % self.num_groups:
                raise ValueError(
                    f"filters * channel_multipliers gives {self.filters * multiplier} channels, "
                    f"which is not a multiple of num_groups {self.num_groups}"
                )

    @property
    def stride(self) -> int:
        """Frames per latent frame."""
        return int(2 ** sum(self.temporal_downsample))


@settings
class VideoVAEConfig:
    """The video autoencoder of Open-Sora 1.2. The defaults are as released.

    A video is cut into chunks of `micro_frame_size` frames; each is encoded on its own, first
    frame by frame (`vae_2d`), then over time (`vae_temporal`), its front padded to whole latent
    frames: 17 frames become 5 latent frames.
    """

    type: Literal["opensora-vae-1.2"] = "opensora-vae-1.2"
    vae_2d: VAE2DConfig = VAE2DConfig()
    vae_temporal: VAETemporalConfig = VAETemporalConfig()
    micro_frame_size: PositiveInt | None = 17
    """Frames of a chunk; null encodes the whole video as one."""
    micro_batch_size: PositiveInt | None = 4
    """Frames that pass the 2D autoencoder at once; null takes a chunk. Changes memory only."""
    spatial_scaling: Annotated[float, Field(gt=0)] = 0.18215
    """Factor on the 2D latents before they enter the temporal autoencoder."""
    shift: tuple[float, ...] = (-0.1, 0.34, 0.27, 0.98)
    """Mean of each latent channel: what is subtracted first."""
    scale: tuple[float, ...] = (3.85, 2.32, 2.33, 3.06)
    """Standard deviation of each latent channel: what is divided by then."""

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            if len(getattr(self, name)) != self.latent_channels:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} numbers; the latent has "
                    f"{self.latent_channels} channels (vae_temporal.embed_dim)"
                )
        if min(self.scale) <= 0:
            raise ValueError(f"scale has {min(self.scale)}; it must be above 0")

    @property
    def latent_channels(self) -> int:
        return self.vae_temporal.embed_dim

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position, along height and along width."""
        return self.vae_2d.stride

    @property
    def time_stride(self) -> int:
        """Frames per latent frame (the last one of a chunk may stand for fewer)."""
        return self.vae_temporal.stride

    @property
    def latent_chunk(self) -> int | None:
        """Latent frames of a chunk of `micro_frame_size` frames; None without chunks."""
        if self.micro_frame_size is None:
            return None
        return math.ceil(self.micro_frame_size / self.time_stride)

    def latent_size(self, frames: int, height: int, width: int) -> LatentSize:
        """Latent (T, H, W) of a video. Sizes that the stride does not divide lose their rest."""
        whole = [math.ceil(n / self.time_stride) for n in chunks(frames, self.micro_frame_size)]
        return sum(whole), height // self.spatial_stride, width // self.spatial_stride

    def nearest_frames(self, frames: int) -> tuple[int, int]:
        """The valid frame counts for generation next to `frames`, at most it and at least it.

        Any count can be encoded, and decoded again when it is told. Valid to ask for is what
        training and the timestep shift count the same way: whole chunks (17, 34, 51, ...), and
        below one chunk (or without chunks) whole latent frames or those and the leading frame
        (1, 4, 5, 8, 9, ...). Both are the same number if `frames` is valid; 1 is the least.
        """
        below = above = max(frames, 1)
        while not self._is_whole(below):
            below -= 1
        while not self._is_whole(above):
            above += 1
        return below, above

    def _is_whole(self, frames: int) -> bool:
        if self.micro_frame_size is None or frames < self.micro_frame_size:
            return frames == 1 or frames % self.time_stride <= 1
        return frames % self.micro_frame_size == 0

    def encode_flops(self, frames: int, height: int, width: int) -> float:
        """FLOPs to encode one video: convolutions and matrix products, multiply-add = 2."""
        _, rows, columns = self.latent_size(1, height, width)
        spatial = frames * encode_2d(self.vae_2d, height, width)
        temporal = sum(
            encode_temporal(
                self.vae_temporal,
                self.vae_2d.latent_channels,
                math.ceil(n / self.time_stride) * self.time_stride,
                rows,
                columns,
            )
            for n in chunks(frames, self.micro_frame_size)
        )
        return spatial + temporal

    def decode_flops(self, frames: int, height: int, width: int) -> float:
        """FLOPs to decode to one video of `frames` frames of `height` x `width` pixels."""
        _, rows, columns = self.latent_size(1, height, width)
        spatial = frames * decode_2d(self.vae_2d, rows, columns)
        temporal = sum(
            decode_temporal(
                self.vae_temporal,
                self.vae_2d.latent_channels,
                math.ceil(n / self.time_stride),
                rows,
                columns,
            )
            for n in chunks(frames, self.micro_frame_size)
        )
        return spatial + temporal


@settings
class ImageVAEConfig:
    """An image autoencoder used frame by frame, as Open-Sora 1.0 and 1.1, DiT, Latte and PixArt
    do (`VideoAutoencoderKL`). The defaults are Stable Diffusion's `sd-vae-ft-ema`."""

    type: Literal["autoencoder-kl"] = "autoencoder-kl"
    vae_2d: VAE2DConfig = VAE2DConfig()
    scaling_factor: Annotated[float, Field(gt=0)] = 0.18215
    """Factor on the latents. Open-Sora 1.x takes Stable Diffusion's for SDXL's autoencoder too."""
    micro_batch_size: PositiveInt | None = 4
    """Frames that are encoded or decoded at once; null takes all. Changes memory only."""

    @property
    def latent_channels(self) -> int:
        return self.vae_2d.latent_channels

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent position, along height and along width."""
        return self.vae_2d.stride

    @property
    def time_stride(self) -> int:
        """Frames per latent frame."""
        return 1

    @property
    def micro_frame_size(self) -> int | None:
        """Frames that belong together: none do."""
        return None

    @property
    def latent_chunk(self) -> int | None:
        """Latent frames that belong together: none do."""
        return None

    def latent_size(self, frames: int, height: int, width: int) -> LatentSize:
        """Latent (T, H, W) of a video. Sizes that the stride does not divide lose their rest."""
        return frames, height // self.spatial_stride, width // self.spatial_stride

    def nearest_frames(self, frames: int) -> tuple[int, int]:
        """The valid frame counts next to `frames`: every count from 1 is valid."""
        return max(frames, 1), max(frames, 1)

    def encode_flops(self, frames: int, height: int, width: int) -> float:
        """FLOPs to encode one video: convolutions and matrix products, multiply-add = 2."""
        return frames * encode_2d(self.vae_2d, height, width)

    def decode_flops(self, frames: int, height: int, width: int) -> float:
        """FLOPs to decode to one video of `frames` frames of `height` x `width` pixels."""
        _, rows, columns = self.latent_size(1, height, width)
        return frames * decode_2d(self.vae_2d, rows, columns)


VAEConfig = Annotated[VideoVAEConfig | ImageVAEConfig, Field(discriminator="type")]


@settings
class Tiling:
    """How an autoencoder works when memory is short: `vae.tiling = Tiling()`.

    Samples and frames go through it one at a time, and each in bands of rows. This is exact (no
    tile sees less than the whole frame), so it is no part of a checkpoint's settings.
    """

    rows: PositiveInt | None = 32
    """Rows of a feature map that are computed at once; null: all, but one frame at a time."""
