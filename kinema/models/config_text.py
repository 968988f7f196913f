"""Settings of the frozen text encoders, and the facts about them that others need without torch."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from kinema.config.settings import settings
from kinema.models.config_types import PositiveInt


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


T5Precision = Literal["fp32", "bf16", "int8"]


class T5Size(NamedTuple):
    """What the FLOPs of a T5 encoder depend on beside its width; heads are 64 wide."""

    layers: int
    heads: int
    feed_forward: int


T5_SIZES = {
    512: T5Size(8, 6, 1024),
    768: T5Size(12, 12, 2048),
    1024: T5Size(24, 16, 2816),
    2048: T5Size(24, 32, 5120),
    4096: T5Size(24, 64, 10240),
}
"""The published T5 v1.1 encoders by width: small, base, large, XL, XXL."""


@settings
class T5TextConfig:
    """The encoder of T5 v1.1 (XXL by default), the text side of Open-Sora 1.x and PixArt."""

    type: Literal["t5"] = "t5"
    max_tokens: PositiveInt = 300
    """120 in Open-Sora 1.0 and PixArt-alpha, 200 in 1.1, 300 in 1.2 and PixArt-Sigma."""
    clean_caption: bool = True
    """Clean captions as the originals do, twice (`text_cleaning.py`); otherwise they are only
    lower-cased and stripped of white space at both ends."""
    dim: PositiveInt = 4096
    """Width of the features (T5's d_model)."""
    precision: T5Precision = "bf16"
    """Of the weights; `int8` is 8 bits for the weights of the layers and bf16 arithmetic. The
    features change with it (bf16 in the third digit), so a text cache is made for one of them."""

    def encode_flops(self) -> float:
        """FLOPs for one caption of `max_tokens`; multiply-add = 2. Shorter ones cost less.

        Of the published encoder of this width. Other widths count with XXL's proportions.
        """
        width, length = self.dim, self.max_tokens
        layers, heads, feed_forward = T5_SIZES.get(
            width, T5Size(24, max(1, width // 64), width * 5 // 2)
        )
        inner = 64 * heads
        attention = 4 * length * width * inner + 2 * length * length * inner
        return 2.0 * layers * (attention + 3 * length * width * feed_forward)


@settings
class CLIPTextConfig:
    """CLIP's text encoder, pooled to one vector: the text side of DiT and Latte with captions."""

    type: Literal["clip"] = "clip"
    max_tokens: PositiveInt = 77
    dim: PositiveInt = 512
    """Width of the pooled vector (ViT-B/32: 512, ViT-L/14: 768)."""

    def encode_flops(self) -> float:
        """FLOPs for one caption; multiply-add = 2. 12 layers with a feed-forward of 4 x `dim`."""
        length, layers = self.max_tokens, 12
        return 2.0 * layers * (12 * length * self.dim**2 + 2 * length**2 * self.dim)


@settings
class ClassTextConfig:
    """No text: the "caption" is the number of a class (ImageNet, UCF-101)."""

    type: Literal["classes"] = "classes"
    num_classes: PositiveInt = 1000

    @property
    def max_tokens(self) -> int:
        """A class has no tokens."""
        return 0

    def encode_flops(self) -> float:
        """Reading a number is no matrix work."""
        return 0.0


TextConfig = Annotated[
    HashTextConfig | T5TextConfig | CLIPTextConfig | ClassTextConfig, Field(discriminator="type")
]
