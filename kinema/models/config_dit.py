"""Settings of DiT, Latte and PixArt, usable without torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from kinema.config.settings import settings
from kinema.models.config_stdit import CaptionBase, TransformerBase
from kinema.models.config_types import PositiveInt


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
    no_temporal_pos_emb: bool = False
    """Add no positions along time (image models)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition != "text" and not re.fullmatch(r"label_[1-9]\d*", self.condition):
            raise ValueError(f"condition is {self.condition!r}; `text` or `label_N`")

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None if conditioned by text."""
        return None if self.condition == "text" else int(self.condition.removeprefix("label_"))


@settings
class DiTConfig(DiTBase):
    """DiT: attention over all tokens, conditioned by adaptive layer norm. The defaults are
    DiT-XL/2 for 256x256 images of ImageNet's classes."""

    type: Literal["dit"] = "dit"


@settings
class LatteConfig(DiTBase):
    """Latte: DiT whose blocks attend within frames and along time by turns. The defaults are
    Latte-XL/2 for UCF-101's classes."""

    type: Literal["latte"] = "latte"
    condition: str = "label_101"
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 32, 32)


@settings
class KVCompressConfig:
    """PixArt-Sigma's shortened keys and values in some blocks."""

    sampling: Literal["conv", "ave", "uniform", "uniform_every"] = "conv"
    scale_factor: PositiveInt = 1
    kv_compress_layer: tuple[int, ...] = ()


@settings
class PixArtConfig(CaptionBase):
    """PixArt-alpha and -Sigma: attention over all tokens and over a caption. The defaults are
    PixArt-alpha XL/2 for 512x512 images."""

    type: Literal["pixart"] = "pixart"
    model_max_length: PositiveInt = 120
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 64, 64)
    """Latent (T, H, W) that the position tables in released files are made for; other sizes are
    computed."""
    space_scale: Annotated[float, Field(gt=0)] = 1.0
    time_scale: Annotated[float, Field(gt=0)] = 1.0
    base_size: PositiveInt | None = None
    """Side in pixels / 8 of the square whose position grid has step one; null: from input_size."""
    no_temporal_pos_emb: bool = True
    """Add no positions along time (image models)."""
    size_conditions: bool = False
    """PixArt-alpha at 1024 (`PixArtMS`): the model is told size and aspect ratio."""
    qk_norm: bool = False
    kv_compress: KVCompressConfig | None = None
