"""Captions and videos into what the transformer takes, by networks that do not train."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinema.config.settings import to_dict
from kinema.data.manifest import Manifest
from kinema.data.text_cache import TextCache, TextCacheWriter
from kinema.models.autoencoder import Autoencoder
from kinema.models.build import build_text_encoder
from kinema.models.config import TextConfig
from kinema.models.text import TextEncoder
from kinema.telemetry.progress import Progress


class TextSource:
    """Text features of clips: from the encoder, or from what was computed beforehand."""

    def __init__(self, encoder: TextEncoder | None, cache: TextCache | None) -> None:
        assert (encoder is None) != (cache is None)
        self.encoder = encoder
        self._cache = cache

    @torch.no_grad()
    def features(
        self, texts: Sequence[str], rows: NDArray[np.int64], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Features of captions.

        Args:
            texts: B captions.
            rows: their rows in the manifest.

        Returns:
            as `TextFeatures`: y on `device`, and the mask on the CPU (it decides sizes).
        """
        if self._cache is not None:
            y, mask = self._cache.features(rows)
            return torch.from_numpy(y)[:, None].to(device, torch.float32), torch.from_numpy(mask)
        assert self.encoder is not None
        found = self.encoder.encode(list(texts))
        return found.y.to(device), found.mask


@torch.no_grad()
def encode_latents(vae: Autoencoder, video: Tensor, generator: torch.Generator) -> Tensor:
    """Normalised latents, drawn from the posterior.

    Args:
        video: `[B, 3, T, H, W]` in [-1, 1].
        generator: of the posterior's noise, on the video's device.

    Returns:
        float32 `[B, C, t, h, w]`.
    """
    latents: Tensor = vae.encode(video, noise=generator)
    return latents.float()


class LatentMemory:
    """Latents of videos seen before, for data so small that they fit in memory.

    Encoding then costs one pass over the data instead of one per epoch. It holds the posteriors'
    means; every video is encoded by itself, so that what is remembered depends on nothing else
    and a resumed run, which begins with an empty memory, goes on bit for bit.
    """

    def __init__(self, vae: Autoencoder) -> None:
        self._vae = vae
        self._known: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents, float32 `[B, C, t, h, w]`, of videos `[B, 3, T, H, W]` in [-1, 1]."""
        return torch.stack([self._one(clip) for clip in video])

    def _one(self, clip: Tensor) -> Tensor:
        # By content, not by row: a row has as many latents as it has crops.
        pixels = clip.cpu().contiguous().numpy()
        key = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest() + str(clip.shape).encode()
        if key not in self._known:
            self._known[key] = self._vae.encode(clip[None])[0].float()
        return self._known[key]


def write_text_cache(
    manifest: Manifest,
    config: TextConfig,
    path: Path,
    *,
    dtype: str = "float16",
    batch_size: int = 256,
) -> None:
    """Encode every caption of a manifest into a cache that `text_cache` of a recipe names.

    Args:
        path: the folder to make; appears when it is complete.
        dtype: `float16` or `float32`.

    Raises:
        KinemaError: the encoder cannot run.
    """
    encoder = build_text_encoder(config)
    writer = TextCacheWriter(path, manifest, to_dict(config), dim=config.dim, dtype=dtype)
    total = len(manifest)
    with writer as cache, Progress("encoding captions", total=total, unit="caption") as bar:
        for start in range(0, total, batch_size):
            rows = range(start, min(start + batch_size, total))
            found = encoder.encode([manifest.text(row) for row in rows])
            cache.append(found.y[:, 0].numpy(), found.mask.numpy())
            bar.advance(len(rows))
