"""From settings to networks. Everything but the text encoders also works on the meta device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kinema.config.errors import KinemaError
from kinema.models.config import HashTextConfig, STDiT3Config, T5TextConfig
from kinema.models.text import HashTextEncoder, TextEncoder

if TYPE_CHECKING:
    import torch

    from kinema.models.config import VideoVAEConfig
    from kinema.models.stdit3 import STDiT3
    from kinema.models.vae import VideoVAE


def build_transformer(config: STDiT3Config, generator: torch.Generator | None = None) -> STDiT3:
    """The transformer, freshly initialised (on the meta device it has no values).

    Args:
        config: its size.
        generator: for the initial values; None: PyTorch's own.
    """
    from kinema.models.stdit3 import STDiT3

    return STDiT3(config, generator)


def build_vae(config: VideoVAEConfig) -> VideoVAE:
    """The video autoencoder, freshly initialised."""
    from kinema.models.vae import VideoVAE

    return VideoVAE(config)


def build_text_encoder(config: HashTextConfig | T5TextConfig) -> TextEncoder:
    """The encoder that turns captions into features.

    Raises:
        KinemaError: for T5, whose features have to be computed beforehand for now.
    """
    if isinstance(config, T5TextConfig):
        raise KinemaError(
            "the T5 text encoder cannot be run yet",
            where="text",
            hint="give precomputed text embeddings, or use text type 'hash-words'",
        )
    return HashTextEncoder(config)
