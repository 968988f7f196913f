"""The autoencoder over time of Open-Sora 1.2: causal 3D convolutions on 2D latents.

Names of modules and parameters are those of the released weights: hence `conv.conv`, and the empty
entries of `conv_blocks` at levels that keep the frame rate.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kinema.models.config import VAETemporalConfig

NORM_EPS = 1e-5


class TemporalVAE(nn.Module):
    """Encoder to the moments of a Gaussian, and decoder, of one chunk of 2D latents.

    Args:
        config: settings.
        channels: channels of the 2D latents.
    """

    def __init__(self, config: VAETemporalConfig, channels: int) -> None:
        super().__init__()
        self.stride = config.stride
        self.encoder = Encoder(config, channels)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = Decoder(config, channels)

    def encode(self, x: Tensor) -> Tensor:
        """`[B, C, T, h, w]` to moments `[B, 2 * embed_dim, ceil(T / stride), h, w]`.

        Zero frames in front fill up the first latent frame.
        """
        moments: Tensor = self.quant_conv(self.encoder(pad_front(x, -x.shape[2] % self.stride)))
        return moments

    def decode(self, z: Tensor, num_frames: int) -> Tensor:
        """`[B, embed_dim, t, h, w]` to `[B, C, num_frames, h, w]`; leading frames are dropped."""
        x: Tensor = self.decoder(self.post_quant_conv(z))
        return x[:, :, x.shape[2] - num_frames :]


class Encoder(nn.Module):
    def __init__(self, config: VAETemporalConfig, channels: int) -> None:
        super().__init__()
        groups, depth = config.num_groups, config.num_res_blocks
        width = config.filters
        self.conv_in = CausalConv3d(channels, width, 3, bias=False)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_multipliers):
            out = config.filters * multiplier
            self.block_res_blocks.append(res_blocks(width, out, depth, groups))
            width = out
            if level < len(config.temporal_downsample):
                halve = config.temporal_downsample[level]
                self.conv_blocks.append(
                    CausalConv3d(width, width, 3, time_stride=2) if halve else nn.Identity()
                )
        self.res_blocks = res_blocks(width, width, depth, groups)
        self.norm1 = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.conv2 = CausalConv3d(width, 2 * config.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, block in enumerate(self.block_res_blocks):
            x = block(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        x = self.res_blocks(x)
        x = self.conv2(F.silu(self.norm1(x)))
        return x


class Decoder(nn.Module):
    """The encoder's levels in reverse; entry i of each list belongs to level i of the encoder."""

    def __init__(self, config: VAETemporalConfig, channels: int) -> None:
        super().__init__()
        groups, depth = config.num_groups, config.num_res_blocks
        multipliers = config.channel_multipliers
        width = config.filters * multipliers[-1]
        self.conv1 = CausalConv3d(config.latent_embed_dim, width, 3)
        self.res_blocks = res_blocks(width, width, depth, groups)
        self.block_res_blocks = nn.ModuleList()
        self.conv_blocks = nn.ModuleList()
        for level in reversed(range(len(multipliers))):
            out = config.filters * multipliers[level]
            self.block_res_blocks.insert(0, res_blocks(width, out, depth, groups))
            width = out
            if level > 0:
                double = config.temporal_downsample[level - 1]
                self.conv_blocks.insert(
                    0, CausalConv3d(width, 2 * width, 3) if double else nn.Identity()
                )
        self.norm1 = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.conv_out = CausalConv3d(width, channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level > 0 and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                x = channels_to_frames(self.conv_blocks[level - 1](x))
        x = self.conv_out(F.silu(self.norm1(x)))
        return x


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=NORM_EPS)
        self.conv1 = CausalConv3d(c_in, c_out, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=NORM_EPS)
        self.conv2 = CausalConv3d(c_out, c_out, 3, bias=False)
        self.conv3 = CausalConv3d(c_in, c_out, 1, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv3 is None else self.conv3(x))


class CausalConv3d(nn.Module):
    """A cubic kernel that sees no later frame; zeros before the first frame and around each."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, time_stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.time_padding = kernel - time_stride
        around = kernel // 2
        self.conv = nn.Conv3d(
            c_in,
            c_out,
            kernel,
            stride=(time_stride, 1, 1),
            padding=(0, around, around),
            bias=bias,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(pad_front(x, self.time_padding))
        return x


def res_blocks(c_in: int, c_out: int, depth: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        *(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(depth))
    )


def pad_front(x: Tensor, frames: int) -> Tensor:
    """Zero frames before the first of `[B, C, T, h, w]`."""
    return F.pad(x, (0, 0, 0, 0, frames, 0)) if frames else x


def channels_to_frames(x: Tensor) -> Tensor:
    """`[B, 2C, T, h, w]` to `[B, C, 2T, h, w]`: channel 2c + i is frame 2t + i of channel c."""
    return x.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)
