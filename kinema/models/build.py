"""From settings to networks. Everything but the text encoders also works on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.errors import KinemaError
from kinema.models.config import (
    ClassTextConfig,
    CLIPTextConfig,
    DiTConfig,
    ImageVAEConfig,
    LatteConfig,
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    T5TextConfig,
    TextConfig,
    TransformerConfig,
    VAEConfig,
)

if TYPE_CHECKING:
    import torch

    from kinema.models.autoencoder import Autoencoder
    from kinema.models.text import TextEncoder
    from kinema.models.transformer import Transformer


def build_transformer(
    config: TransformerConfig, generator: torch.Generator | None = None
) -> Transformer:
    """The transformer, freshly initialised (on the meta device it has no values).

    Args:
        config: its kind and size.
        generator: for the initial values; None: PyTorch's own.
    """
    if isinstance(config, STDiT3Config):
        from kinema.models.stdit3 import STDiT3

        return STDiT3(config, generator)
    if isinstance(config, STDiT2Config):
        from kinema.models.stdit2 import STDiT2

        return STDiT2(config, generator)
    if isinstance(config, STDiTConfig):
        from kinema.models.stdit import STDiT

        return STDiT(config, generator)
    if isinstance(config, DiTConfig):
        from kinema.models.dit import DiT

        return DiT(config, generator)
    if isinstance(config, LatteConfig):
        from kinema.models.dit import Latte

        return Latte(config, generator)
    if isinstance(config, PixArtConfig):
        from kinema.models.pixart import PixArt

        return PixArt(config, generator)
    raise AssertionError(f"no model for {type(config).__name__}")


def build_vae(config: VAEConfig) -> Autoencoder:
    """The autoencoder, freshly initialised."""
    if isinstance(config, ImageVAEConfig):
        from kinema.models.image_vae import ImageVAE

        return ImageVAE(config)
    from kinema.models.vae import VideoVAE

    return VideoVAE(config)


def build_text_encoder(config: TextConfig, weights: Path | None = None) -> TextEncoder:
    """The encoder that turns captions into features.

    Args:
        weights: folder of a pretrained encoder and its tokenizer, for those that have weights.

    Raises:
        KinemaError: weights are missing or do not fit.
    """
    if isinstance(config, T5TextConfig):
        from kinema.models.text_t5 import T5TextEncoder

        return T5TextEncoder(config, weights)
    if isinstance(config, CLIPTextConfig):
        from kinema.models.text_clip import CLIPTextEncoder

        return CLIPTextEncoder(config, weights)
    if weights is not None:
        raise KinemaError(
            f"the text encoder {config.type!r} has no weights",
            where=str(weights),
            hint="leave it out",
        )
    if isinstance(config, ClassTextConfig):
        from kinema.models.text_classes import ClassTextEncoder

        return ClassTextEncoder(config)
    from kinema.models.text import HashTextEncoder

    return HashTextEncoder(config)
