"""From settings to networks. Everything but the text encoders also works on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.errors import KinemaError
from kinema.models.config import (
    DiTConfig,
    HashTextConfig,
    ImageVAEConfig,
    LatteConfig,
    STDiT3Config,
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
    if isinstance(config, DiTConfig):
        from kinema.models.dit import DiT

        return DiT(config, generator)
    if isinstance(config, LatteConfig):
        from kinema.models.dit import Latte

        return Latte(config, generator)
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
    if isinstance(config, HashTextConfig):
        from kinema.models.text import HashTextEncoder

        return HashTextEncoder(config)
    raise KinemaError(
        f"the text encoder {config.type!r} cannot be run yet",
        where="text",
        hint="give precomputed text embeddings, or use text type 'hash-words'",
    )
