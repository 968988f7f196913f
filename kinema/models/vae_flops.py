"""FLOPs of the Open-Sora 1.2 autoencoder, layer by layer as the networks are built.

Convolutions and matrix products only, multiply-add = 2; norms, activations and resampling are left
out. Every function counts one chunk of one video; torch is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinema.models.config import VAE2DConfig, VAETemporalConfig


def encode_2d(config: VAE2DConfig, height: int, width: int) -> float:
    """FLOPs to encode one frame of `height` x `width` pixels."""
    widths, depth = config.block_out_channels, config.layers_per_block
    total = _conv(3, widths[0], 9, height * width)
    channels = widths[0]
    for level, out in enumerate(widths):
        for _ in range(depth):
            total += _resnet(channels, out, 9, height * width)
            channels = out
        if level < len(widths) - 1:
            height, width = height // 2, width // 2
            total += _conv(channels, channels, 9, height * width)
    total += _middle(channels, height * width)
    moments = 2 * config.latent_channels
    total += _conv(channels, moments, 9, height * width)
    return total + _conv(moments, moments, 1, height * width)


def decode_2d(config: VAE2DConfig, height: int, width: int) -> float:
    """FLOPs to decode one frame of `height` x `width` latent positions."""
    widths, depth = config.block_out_channels[::-1], config.layers_per_block + 1
    latent = config.latent_channels
    total = _conv(latent, latent, 1, height * width)
    total += _conv(latent, widths[0], 9, height * width)
    total += _middle(widths[0], height * width)
    channels = widths[0]
    for level, out in enumerate(widths):
        for _ in range(depth):
            total += _resnet(channels, out, 9, height * width)
            channels = out
        if level < len(widths) - 1:
            height, width = height * 2, width * 2
            total += _conv(channels, channels, 9, height * width)
    return total + _conv(channels, 3, 9, height * width)


def encode_temporal(
    config: VAETemporalConfig, channels_2d: int, frames: int, height: int, width: int
) -> float:
    """FLOPs to encode one chunk of 2D latents; `frames` counts the padding as well."""
    area = height * width
    total = _conv(channels_2d, config.filters, 27, frames * area)
    channels = config.filters
    for level, multiplier in enumerate(config.channel_multipliers):
        out = config.filters * multiplier
        for _ in range(config.num_res_blocks):
            total += _resnet(channels, out, 27, frames * area)
            channels = out
        if level < len(config.temporal_downsample) and config.temporal_downsample[level]:
            frames = math.ceil(frames / 2)
            total += _conv(channels, channels, 27, frames * area)
    total += config.num_res_blocks * _resnet(channels, channels, 27, frames * area)
    total += _conv(channels, 2 * config.latent_embed_dim, 1, frames * area)
    return total + _conv(2 * config.latent_embed_dim, 2 * config.embed_dim, 1, frames * area)


def decode_temporal(
    config: VAETemporalConfig, channels_2d: int, frames: int, height: int, width: int
) -> float:
    """FLOPs to decode one chunk of `frames` latent frames, padding included."""
    area = height * width
    channels = config.filters * config.channel_multipliers[-1]
    total = _conv(config.embed_dim, config.latent_embed_dim, 1, frames * area)
    total += _conv(config.latent_embed_dim, channels, 27, frames * area)
    total += config.num_res_blocks * _resnet(channels, channels, 27, frames * area)
    for level in reversed(range(len(config.channel_multipliers))):
        out = config.filters * config.channel_multipliers[level]
        for _ in range(config.num_res_blocks):
            total += _resnet(channels, out, 27, frames * area)
            channels = out
        if level > 0 and config.temporal_downsample[level - 1]:
            total += _conv(channels, 2 * channels, 27, frames * area)
            frames *= 2
    return total + _conv(channels, channels_2d, 27, frames * area)


def chunks(frames: int, micro_frame_size: int | None) -> Iterator[int]:
    """Lengths of the chunks that are encoded on their own: 40 frames by 17 are 17, 17, 6."""
    size = micro_frame_size or frames
    for start in range(0, frames, size):
        yield min(size, frames - start)


def _conv(channels_in: int, channels_out: int, taps: int, positions: int) -> float:
    return 2.0 * channels_in * channels_out * taps * positions


def _resnet(channels_in: int, channels_out: int, taps: int, positions: int) -> float:
    shortcut = 0.0 if channels_in == channels_out else _conv(channels_in, channels_out, 1, 1)
    body = _conv(channels_in, channels_out, taps, 1) + _conv(channels_out, channels_out, taps, 1)
    return positions * (body + shortcut)


def _middle(channels: int, positions: int) -> float:
    linears = 4 * _conv(channels, channels, 1, positions)
    attention = 4.0 * positions * positions * channels
    return 2 * _resnet(channels, channels, 9, positions) + linears + attention
