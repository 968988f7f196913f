"""The image autoencoder of Stable Diffusion (a KL autoencoder), frame by frame.

Names of modules and parameters are those of diffusers' `AutoencoderKL`, so that released weights
load without a table: hence lists with one entry (`attentions.0`, `downsamplers.0`, `to_out.0`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kinema.models.config import Tiling, VAE2DConfig
from kinema.models.vae_tiling import in_parts

NORM_EPS = 1e-6


class AutoencoderKL(nn.Module):
    """Encoder to the moments of a Gaussian, and decoder, of single frames.

    A frame `[N, 3, H, W]` in [-1, 1] becomes moments `[N, 2C, H // stride, W // stride]`: C means,
    then C log-variances.
    """

    def __init__(self, config: VAE2DConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments = 2 * config.latent_channels
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode_frames(self, frames: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(frames))
        return moments

    def decode_frames(self, z: Tensor) -> Tensor:
        """`[N, C, h, w]`, as sampled from the moments, to `[N, 3, h * stride, w * stride]`."""
        frames: Tensor = self.decoder(self.post_quant_conv(z))
        return frames

    def encode_video(
        self, video: Tensor, micro_batch_size: int | None, tiling: Tiling | None = None
    ) -> Tensor:
        """Moments `[B, 2C, T, h, w]` of a video `[B, 3, T, H, W]`, in the dtype of the weights.

        Args:
            micro_batch_size: frames that are coded at once; None: all. Changes memory only.
            tiling: takes them one by one, and in bands. Changes memory only.
        """
        return _frame_by_frame(self.encode_frames, self._cast(video), micro_batch_size, tiling)

    def decode_video(
        self, z: Tensor, micro_batch_size: int | None, tiling: Tiling | None = None
    ) -> Tensor:
        """A video `[B, 3, T, H, W]` of latents `[B, C, T, h, w]` as sampled from the moments."""
        return _frame_by_frame(self.decode_frames, self._cast(z), micro_batch_size, tiling)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.quant_conv.weight.dtype)


class Encoder(nn.Module):
    def __init__(self, config: VAE2DConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            block = DownBlock(channels, width, config.layers_per_block, groups, down=not last)
            self.down_blocks.append(block)
            channels = width
        self.mid_block = MidBlock(channels, groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x


class Decoder(nn.Module):
    def __init__(self, config: VAE2DConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            block = UpBlock(channels, width, config.layers_per_block + 1, groups, up=not last)
            self.up_blocks.append(block)
            channels = width
        self.conv_norm_out = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        return x


class DownBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, depth: int, groups: int, *, down: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(depth)
        )
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, depth: int, groups: int, *, up: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(depth)
        )
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if up else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SelfAttention(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.resnets
        x = second(self.attentions[0](first(x)))
        return x


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SelfAttention(nn.Module):
    """One head over all positions of a frame, with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [N, 1 head, h * w, C]
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v))
        return x + tokens[:, 0].transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # The released weights were trained with padding on the right and at the bottom only.
        x = self.conv(F.pad(x, (0, 1, 0, 1)))
        return x


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


def _frame_by_frame(
    network: Callable[[Tensor], Tensor],
    video: Tensor,
    micro_batch_size: int | None,
    tiling: Tiling | None,
) -> Tensor:
    """A network for single frames on `[B, C, T, H, W]`: `[B, C', T, H', W']`."""
    batch, _, count, _, _ = video.shape
    if video.device.type == "cpu":  # every layer keeps this order, and is up to 1.9 times as fast
        frames = video.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)
        frames = frames.contiguous(memory_format=torch.channels_last)
    else:
        frames = video.transpose(1, 2).flatten(0, 1)
    size, rows = (1, tiling.rows) if tiling else (micro_batch_size, None)
    coded = in_parts(network, frames, size=size, rows=rows)
    return coded.unflatten(0, (batch, count)).transpose(1, 2)
