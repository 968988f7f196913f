"""Settings of all networks: the one door through which other rooms name them, without torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kinema.models.config_dit import DiTConfig, KVCompressConfig, LatteConfig, PixArtConfig
from kinema.models.config_stdit import STDiT2Config, STDiT3Config, STDiTConfig
from kinema.models.config_text import (
    ClassTextConfig,
    CLIPTextConfig,
    HashTextConfig,
    T5Precision,
    T5TextConfig,
    TextConfig,
)
from kinema.models.config_types import (
    FREQUENCY_CHANNELS,
    AttentionBackend,
    LatentSize,
    PositiveInt,
)
from kinema.models.config_vae import (
    ImageVAEConfig,
    Tiling,
    VAE2DConfig,
    VAEConfig,
    VAETemporalConfig,
    VideoVAEConfig,
)

TransformerConfig = Annotated[
    STDiT3Config | STDiT2Config | STDiTConfig | DiTConfig | LatteConfig | PixArtConfig,
    Field(discriminator="type"),
]


def mismatch(model: TransformerConfig, text: TextConfig) -> str | None:
    """Why this transformer cannot take what this text encoder gives; None if it can."""
    if isinstance(model, (DiTConfig, LatteConfig)):
        classes = model.num_classes
        if classes is not None:
            if isinstance(text, ClassTextConfig) and text.num_classes == classes:
                return None
            return f"the model takes one of {classes} classes: text type `classes` with as many"
        if not isinstance(text, CLIPTextConfig):
            return "the model takes one vector per caption: text type `clip`"
        if text.dim != model.caption_channels:
            return _other_width(model.caption_channels, text.dim)
        return None
    if not isinstance(text, (HashTextConfig, T5TextConfig)):
        return f"the model takes the tokens of a caption, text type `{text.type}` gives none"
    if model.caption_channels != text.dim:
        return _other_width(model.caption_channels, text.dim)
    if model.model_max_length != text.max_tokens:
        return (
            f"model.model_max_length is {model.model_max_length}, "
            f"but the text encoder gives {text.max_tokens} tokens (text.max_tokens)"
        )
    return None


def _other_width(model: int, text: int) -> str:
    return (
        f"model.caption_channels is {model}, but the text encoder gives {text} channels (text.dim)"
    )


__all__ = [
    "FREQUENCY_CHANNELS",
    "AttentionBackend",
    "CLIPTextConfig",
    "ClassTextConfig",
    "DiTConfig",
    "HashTextConfig",
    "ImageVAEConfig",
    "KVCompressConfig",
    "LatentSize",
    "LatteConfig",
    "PixArtConfig",
    "PositiveInt",
    "STDiT2Config",
    "STDiT3Config",
    "STDiTConfig",
    "T5Precision",
    "T5TextConfig",
    "TextConfig",
    "Tiling",
    "TransformerConfig",
    "VAE2DConfig",
    "VAEConfig",
    "VAETemporalConfig",
    "VideoVAEConfig",
    "mismatch",
]
