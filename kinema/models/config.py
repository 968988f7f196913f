"""Settings of the networks, and the facts about them that others need without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from kinema.config.settings import settings

LatentSize = tuple[int, int, int]
"""Latent frames, rows and columns: (T, H, W)."""

AttentionBackend = Literal["auto", "math", "efficient", "flash", "cudnn"]
"""Kernel behind `scaled_dot_product_attention`; "auto" leaves the choice to PyTorch."""

PositiveInt = Annotated[int, Field(gt=0)]

FREQUENCY_CHANNELS = 256
"""Width of the sinusoidal features of a timestep or a frame rate, before their network."""


@settings
class STDiT3Config:
    """The transformer of Open-Sora 1.2. The defaults are STDiT3-XL/2 as released."""

    type: Literal["stdit3"] = "stdit3"
    depth: PositiveInt = 28
    """Pairs of one spatial and one temporal block."""
    hidden_size: PositiveInt = 1152
    num_heads: PositiveInt = 16
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    in_channels: PositiveInt = 4
    """Channels of the latent."""
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    """Latent frames, rows and columns that make one token."""
    caption_channels: PositiveInt = 4096
    """Width of the text encoder's features."""
    model_max_length: PositiveInt = 300
    """Most text tokens; length of the learned stand-in for an empty caption."""
    input_sq_size: PositiveInt = 512
    """Side in pixels of the square whose position grid has step one."""
    qk_norm: bool = True
    """RMS-normalise queries and keys of self-attention, per head."""
    pred_sigma: bool = True
    """Twice the channels come out; rectified flow uses the first half."""
    class_dropout_prob: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How often training replaces a caption by the learned stand-in."""
    freeze_y_embedder: bool = False
    """The caption projection does not train (released recipes freeze it)."""
    skip_y_embedder: bool = False
    """Text arrives projected and packed, `[1, sum of lengths, hidden_size]`."""
    attention: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads is {self.head_dim}; rotary positions need an even number"
            )
        if self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 4, which positions need"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    def token_grid(self, latent: LatentSize) -> LatentSize:
        """Tokens along time, height and width; sizes that patches do not divide are padded."""
        t, h, w = (math.ceil(n / p) for n, p in zip(latent, self.patch_size, strict=True))
        return t, h, w

    def num_tokens(self, latent: LatentSize) -> int:
        return math.prod(self.token_grid(latent))

    def forward_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """FLOPs of one forward pass for one sample: matrix products only, multiply-add = 2.

        Args:
            latent: latent size (T, H, W).
            text_tokens: text tokens that the mask keeps; the others cost nothing.
        """
        d, patch = self.hidden_size, math.prod(self.patch_size)
        frames, rows, columns = self.token_grid(latent)
        spatial = rows * columns
        tokens = frames * spatial

        embed = tokens * self.in_channels * patch * d
        condition = 2 * (FREQUENCY_CHANNELS * d + d * d) + 6 * d * d  # timestep, fps, t_block
        caption = 0 if self.skip_y_embedder else text_tokens * (self.caption_channels * d + d * d)
        linear = tokens * (4 * d * d + 2 * d * d + 2 * d * self.mlp_size)  # self, cross, MLP
        text = text_tokens * 2 * d * d + 2 * tokens * text_tokens * d  # keys and values; attention
        scores = 2 * tokens * (spatial + frames) * d  # of one spatial and one temporal block
        final = tokens * d * patch * self.out_channels
        multiply_adds = (
            embed + condition + caption + self.depth * (2 * (linear + text) + scores) + final
        )
        return 2.0 * multiply_adds


@settings
class HashTextConfig:
    """A frozen text encoder without weights: words become fixed pseudo-random vectors."""

    type: Literal["hash-words"] = "hash-words"
    dim: PositiveInt = 256
    max_tokens: PositiveInt = 24
    """Words and punctuation marks kept of a caption, its begin marker included."""

    def encode_flops(self) -> float:
        """FLOPs for one caption: hashing is no matrix work."""
        return 0.0


@settings
class T5TextConfig:
    """T5 v1.1 XXL's encoder, the text side of Open-Sora 1.x: its facts, not its network."""

    type: Literal["t5"] = "t5"
    max_tokens: PositiveInt = 300

    @property
    def dim(self) -> int:
        """Width of the features."""
        return 4096

    def encode_flops(self) -> float:
        """FLOPs for one caption, padded to `max_tokens`; multiply-add = 2.

        24 layers; attention with 64 heads of 64; gated feed-forward of width 10240.
        """
        layers, width, heads, feed_forward, length = 24, self.dim, 64 * 64, 10240, self.max_tokens
        attention = 4 * length * width * heads + 2 * length * length * heads
        return 2.0 * layers * (attention + 3 * length * width * feed_forward)


TextConfig = Annotated[HashTextConfig | T5TextConfig, Field(discriminator="type")]
