"""Settings of the STDiT family (Open-Sora 1.0, 1.1, 1.2), usable without torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from kinema.config.settings import settings
from kinema.models.config_types import (
    FREQUENCY_CHANNELS,
    AttentionBackend,
    LatentSize,
    PositiveInt,
)


@settings
class TransformerBase:
    """What the settings of all 1.x transformers have in common. Defaults are size XL/2."""

    depth: PositiveInt = 28
    """Blocks (STDiT3: pairs of one spatial and one temporal block)."""
    hidden_size: PositiveInt = 1152
    num_heads: PositiveInt = 16
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    in_channels: PositiveInt = 4
    """Channels of the latent."""
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    """Latent frames, rows and columns that make one token."""
    pred_sigma: bool = True
    """Twice the channels come out: noise (or velocity), then what IDDPM learns of the variance."""
    class_dropout_prob: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How often training replaces a caption (or class) by the learned stand-in."""
    attention: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
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

    @property
    def uses_frame_mask(self) -> bool:
        """Whether some frames can be given clean (references, masks in training)."""
        return False

    def forward_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """FLOPs of one forward pass for one sample: matrix products only, multiply-add = 2.

        Args:
            latent: latent size (T, H, W).
            text_tokens: text tokens that the mask keeps; the others cost nothing.
        """
        raise NotImplementedError

    def widening_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """The part of `forward_flops` that products in blocks take whose result is wider than what
        its elements are summed over: queries, keys and values together, the way into the MLP.

        Args:
            latent: latent size (T, H, W).
            text_tokens: text tokens that the mask keeps.
        """
        raise NotImplementedError

    def _widening_mlp(self) -> int:
        """Multiply-adds of one token in the wider-making layer of the MLP."""
        return self.hidden_size * self.mlp_size if self.mlp_size != self.hidden_size else 0

    def token_grid(self, latent: LatentSize) -> LatentSize:
        """Tokens along time, height and width; sizes that patches do not divide are padded."""
        t, h, w = (math.ceil(n / p) for n, p in zip(latent, self.patch_size, strict=True))
        return t, h, w

    def num_tokens(self, latent: LatentSize) -> int:
        return math.prod(self.token_grid(latent))


@settings
class CaptionBase(TransformerBase):
    """A transformer whose tokens attend to the tokens of a caption."""

    caption_channels: PositiveInt = 4096
    """Width of the text encoder's features."""
    model_max_length: PositiveInt = 300
    """Most text tokens; length of the learned stand-in for an empty caption."""


@settings
class STDiTBase(CaptionBase):
    """The STDiT family, which can be told that some frames are clean."""

    @property
    def uses_frame_mask(self) -> bool:
        # A token of several latent frames cannot be half clean.
        return self.patch_size[0] == 1


@settings
class STDiTConfig(STDiTBase):
    """The transformer of Open-Sora 1.0. The defaults are STDiT-XL/2 at 16x256x256."""

    type: Literal["stdit"] = "stdit"
    model_max_length: PositiveInt = 120
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 32, 32)
    """Latent (T, H, W) that the position tables in released files are made for; other sizes are
    computed."""
    space_scale: Annotated[float, Field(gt=0)] = 0.5
    """Positions along height and width are divided by this (0.5 at 256, 1 at 512 pixels)."""
    time_scale: Annotated[float, Field(gt=0)] = 1.0
    """Positions along time are divided by this (2/3 at 64 frames)."""

    def forward_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """See `TransformerBase.forward_flops`."""
        d = self.hidden_size
        condition = FREQUENCY_CHANNELS * d + d * d + 6 * d * d  # timestep, t_block
        return _stdit_flops(self, latent, text_tokens, condition)

    def widening_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """See `TransformerBase.widening_flops`."""
        return _stdit_widening(self, latent, text_tokens)


@settings
class STDiT2Config(STDiTBase):
    """The transformer of Open-Sora 1.1. The defaults are STDiT2-XL/2 as released."""

    type: Literal["stdit2"] = "stdit2"
    model_max_length: PositiveInt = 200
    input_sq_size: PositiveInt = 512
    """Side in pixels of the square whose position grid has step one."""
    qk_norm: bool = True
    """RMS-normalise queries and keys of self-attention, per head."""
    qk_norm_legacy: bool = True
    """That norm comes after the rotation, as in 1.1, and not before it."""
    freeze_y_embedder: bool = False
    """The caption projection does not train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_even_heads(self.head_dim)
        if self.hidden_size % 3:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 3: height, width and aspect "
                "ratio have a third of it each"
            )

    def forward_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """See `TransformerBase.forward_flops`."""
        d, third = self.hidden_size, self.hidden_size // 3
        condition = 3 * (FREQUENCY_CHANNELS * d + d * d)  # timestep, length, frame rate
        condition += 3 * (FREQUENCY_CHANNELS * third + third * third)  # height, width, ratio
        condition += (6 + 3) * d * d  # t_block, t_block_temp
        return _stdit_flops(self, latent, text_tokens, condition)

    def widening_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """See `TransformerBase.widening_flops`."""
        return _stdit_widening(self, latent, text_tokens)


@settings
class STDiT3Config(STDiTBase):
    """The transformer of Open-Sora 1.2. The defaults are STDiT3-XL/2 as released."""

    type: Literal["stdit3"] = "stdit3"
    input_sq_size: PositiveInt = 512
    """Side in pixels of the square whose position grid has step one."""
    qk_norm: bool = True
    """RMS-normalise queries and keys of self-attention, per head."""
    freeze_y_embedder: bool = False
    """The caption projection does not train (released recipes freeze it)."""
    skip_y_embedder: bool = False
    """Text arrives projected and packed, `[1, sum of lengths, hidden_size]`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_even_heads(self.head_dim)

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

    def widening_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """See `TransformerBase.widening_flops`."""
        d, tokens = self.hidden_size, self.num_tokens(latent)
        block = tokens * (3 * d * d + self._widening_mlp()) + text_tokens * 2 * d * d
        return 2.0 * self.depth * 2 * block


def _stdit_flops(
    config: STDiTConfig | STDiT2Config, latent: LatentSize, text_tokens: int, condition: int
) -> float:
    """FLOPs of 1.0 and 1.1, whose blocks attend three times; `condition` in multiply-adds."""
    d, patch = config.hidden_size, math.prod(config.patch_size)
    frames, rows, columns = config.token_grid(latent)
    spatial = rows * columns
    tokens = frames * spatial

    embed = tokens * config.in_channels * patch * d
    caption = text_tokens * (config.caption_channels * d + d * d)
    # Space, time, text, feed-forward.
    linear = tokens * (4 * d * d + 4 * d * d + 2 * d * d + 2 * d * config.mlp_size)
    text = text_tokens * 2 * d * d + 2 * tokens * text_tokens * d  # keys and values; attention
    scores = 2 * tokens * (spatial + frames) * d
    final = tokens * d * patch * config.out_channels
    return 2.0 * (embed + condition + caption + config.depth * (linear + text + scores) + final)


def _stdit_widening(
    config: STDiTConfig | STDiT2Config, latent: LatentSize, text_tokens: int
) -> float:
    """`widening_flops` of 1.0 and 1.1: queries, keys and values in space and in time."""
    d, tokens = config.hidden_size, config.num_tokens(latent)
    block = tokens * (6 * d * d + config._widening_mlp()) + text_tokens * 2 * d * d
    return 2.0 * config.depth * block


def _require_even_heads(head_dim: int) -> None:
    if head_dim % 2:
        raise ValueError(
            f"hidden_size / num_heads is {head_dim}; rotary positions need an even number"
        )
