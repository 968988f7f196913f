"""Settings of DiT, Latte and PixArt, usable without torch."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field

from kinema.config.settings import settings
from kinema.models.config_stdit import CaptionBase, TransformerBase
from kinema.models.config_types import FREQUENCY_CHANNELS, LatentSize, PositiveInt


@settings
class DiTBase(TransformerBase):
    """What DiT and Latte have in common."""

    condition: str = "label_1000"
    """`label_N`: one of N classes. `text`: one pooled vector of a caption."""
    caption_channels: PositiveInt = 512
    """Width of the pooled vector, with `condition: text`."""
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 32, 32)
    """Latent (T, H, W) that the position tables in released files are made for; other sizes are
    computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition != "text" and not re.fullmatch(r"label_[1-9]\d*", self.condition):
            raise ValueError(f"condition is {self.condition!r}; `text` or `label_N`")

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if conditioned by text."""
        return None if self.condition == "text" else int(self.condition.removeprefix("label_"))

    def forward_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """FLOPs of one forward pass for one sample: matrix products only, multiply-add = 2.

        Args:
            latent: latent size (T, H, W).
            text_tokens: has no effect; these models take a class or one vector.
        """
        d, patch = self.hidden_size, math.prod(self.patch_size)
        tokens = self.num_tokens(latent)

        embed = tokens * self.in_channels * patch * d
        condition = FREQUENCY_CHANNELS * d + d * d
        if self.num_classes is None:
            condition += self.caption_channels * d + d * d
        linear = 6 * d * d + tokens * (4 * d * d + 2 * d * self.mlp_size)
        scores = 2 * d * tokens * self._keys_of_all_blocks(latent)
        final = 2 * d * d + tokens * d * patch * self.out_channels
        return 2.0 * (embed + condition + self.depth * linear + scores + final)

    def widening_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """See `TransformerBase.widening_flops`."""
        d, tokens = self.hidden_size, self.num_tokens(latent)
        return 2.0 * self.depth * (6 * d * d + tokens * (3 * d * d + self._widening_mlp()))

    def _keys_of_all_blocks(self, latent: LatentSize) -> int:
        """Tokens that a token attends to, summed over the blocks."""
        raise NotImplementedError


@settings
class DiTConfig(DiTBase):
    """DiT: attention over all tokens, conditioned by adaptive layer norm. The defaults are
    DiT-XL/2 for 256x256 images of ImageNet's classes."""

    type: Literal["dit"] = "dit"
    no_temporal_pos_emb: bool = True
    """Add no positions along time (image models)."""

    def _keys_of_all_blocks(self, latent: LatentSize) -> int:
        return self.depth * self.num_tokens(latent)


@settings
class LatteConfig(DiTBase):
    """Latte: DiT whose blocks attend within frames and along time by turns. The defaults are
    Latte-XL/2 for UCF-101's classes."""

    type: Literal["latte"] = "latte"
    condition: str = "label_101"
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 32, 32)

    def _keys_of_all_blocks(self, latent: LatentSize) -> int:
        frames, rows, columns = self.token_grid(latent)
        along_time = self.depth // 2
        return (self.depth - along_time) * rows * columns + along_time * frames


@settings
class KVCompressConfig:
    """PixArt-Sigma's shortened keys and values in some blocks."""

    sampling: Literal["conv", "ave", "uniform", "uniform_every"] = "conv"
    """`conv`: a learned mean of each square of tokens, normalised. `ave` and `uniform`: the first
    token of each square (the original's `ave` averages nothing). `uniform_every`: every
    `scale_factor`-th token in reading order."""
    scale_factor: Annotated[int, Field(ge=2)] = 2
    """Side of the square of tokens that becomes one."""
    kv_compress_layer: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Numbers of the blocks that do so."""

    def keys(self, grid: LatentSize) -> int:
        """Keys that are left of a grid of tokens (T, H, W)."""
        frames, rows, columns = grid
        if self.sampling == "uniform_every":
            return math.ceil(frames * rows * columns / self.scale_factor)
        return frames * (rows // self.scale_factor) * (columns // self.scale_factor)


@settings
class PixArtConfig(CaptionBase):
    """PixArt-alpha and -Sigma: attention over all tokens and over a caption. The defaults are
    PixArt-alpha XL/2 for 512x512 images."""

    type: Literal["pixart"] = "pixart"
    model_max_length: PositiveInt = 120
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 64, 64)
    """Latent (T, H, W) that the position tables in released files are made for; other sizes are
    computed, in the same range of positions."""
    space_scale: Annotated[float, Field(gt=0)] = 1.0
    """Positions along height and width are divided by this (2 at 1024 pixels)."""
    time_scale: Annotated[float, Field(gt=0)] = 1.0
    """Positions along time are divided by this."""
    base_size: PositiveInt | None = None
    """Side of the square latent whose position grid has step one; null: from input_size."""
    no_temporal_pos_emb: bool = True
    """Add no positions along time (image models)."""
    size_conditions: bool = False
    """PixArt-alpha at 1024 (`PixArtMS`): the model is told size and aspect ratio."""
    qk_norm: bool = False
    """RMS-normalise queries and keys of self-attention, per head."""
    kv_compress: KVCompressConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size_conditions and self.hidden_size % 3:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of 3, which height, width and "
                "aspect ratio (size_conditions) share"
            )
        if self.kv_compress is not None:
            beyond = [i for i in self.kv_compress.kv_compress_layer if i >= self.depth]
            if beyond:
                raise ValueError(
                    f"kv_compress.kv_compress_layer names block {beyond[0]}, but the last of "
                    f"{self.depth} is {self.depth - 1}"
                )

    @property
    def position_grid(self) -> int:
        """Side in tokens of the square that position tables are stretched to."""
        if self.base_size is not None:
            return self.base_size // self.patch_size[1]
        _, height, width = self.input_size
        return math.isqrt((height // self.patch_size[1]) * (width // self.patch_size[2]))

    def compresses(self, block: int) -> bool:
        """Whether the block of that number has fewer keys than tokens."""
        return self.kv_compress is not None and block in self.kv_compress.kv_compress_layer

    def forward_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """FLOPs of one forward pass for one sample: matrix products only, multiply-add = 2.

        Args:
            latent: latent size (T, H, W).
            text_tokens: text tokens that the mask keeps; the others cost nothing.
        """
        d, patch = self.hidden_size, math.prod(self.patch_size)
        grid = self.token_grid(latent)
        tokens = math.prod(grid)

        embed = tokens * self.in_channels * patch * d
        condition = FREQUENCY_CHANNELS * d + d * d + 6 * d * d  # timestep, t_block
        if self.size_conditions:
            condition += 3 * (FREQUENCY_CHANNELS * d // 3 + (d // 3) ** 2)
        caption = text_tokens * (self.caption_channels * d + d * d)
        linear = tokens * (4 * d * d + 2 * d * d + 2 * d * self.mlp_size)  # self, cross, MLP
        text = text_tokens * 2 * d * d + 2 * tokens * text_tokens * d  # keys and values; attention
        scores, pooling = self.depth * 2 * d * tokens * tokens, 0
        if self.kv_compress is not None:
            blocks, keys = len(set(self.kv_compress.kv_compress_layer)), self.kv_compress.keys(grid)
            scores -= blocks * 2 * d * tokens * (tokens - keys)
            if self.kv_compress.sampling == "conv":
                pooling = blocks * 2 * d * keys * self.kv_compress.scale_factor**2
        final = tokens * d * patch * self.out_channels
        multiply_adds = (
            embed + condition + caption + self.depth * (linear + text) + scores + pooling + final
        )
        return 2.0 * multiply_adds

    def widening_flops(self, latent: LatentSize, text_tokens: int) -> float:
        """See `TransformerBase.widening_flops`."""
        d, tokens = self.hidden_size, self.num_tokens(latent)
        block = tokens * (3 * d * d + self._widening_mlp()) + text_tokens * 2 * d * d
        return 2.0 * self.depth * block
