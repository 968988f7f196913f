"""Captions and videos into what the transformer takes, by networks that do not train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.config.settings import to_dict
from kinema.data.loader import Batch, ClipKey
from kinema.data.manifest import Manifest
from kinema.data.text_cache import TextCache, caption_hashes, manifest_hashes
from kinema.data.text_cache_writer import TextCacheWriter
from kinema.models.autoencoder import Autoencoder
from kinema.models.config import ClassTextConfig, CLIPTextConfig, TextConfig
from kinema.models.text import TextEncoder, TextFeatures
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
            # Sent as it was kept, and without waiting: float32 on the device.
            there = torch.from_numpy(y)[:, None].to(device, non_blocking=device.type != "cpu")
            return there.float(), torch.from_numpy(mask)
        assert self.encoder is not None
        found = self.encoder.encode(list(texts))
        return found.y.to(device), found.mask


class LatentMemory:
    """Latents of clips seen before, for data so small that they fit in memory.

    Decoding and encoding then cost one pass over the data instead of one per epoch: the loader
    asks which clips are known and decodes the others. It holds the posteriors' means; every clip
    is encoded by itself, so that what is remembered depends on nothing else and a resumed run,
    which begins with an empty memory, goes on bit for bit.
    """

    def __init__(self) -> None:
        self._latents: dict[ClipKey, Tensor] = {}

    def clear(self) -> None:
        """Forget all."""
        self._latents.clear()

    def __contains__(self, key: ClipKey) -> bool:
        return key in self._latents

    @torch.no_grad()
    def latents(self, vae: Autoencoder, batch: Batch) -> Tensor:
        """Normalised latents of a micro-batch, float32 `[B, C, t, h, w]`.

        Args:
            batch: with the pixels of all clips that are not known, on the device of `vae`.
        """
        pixels = iter(batch.video)
        for key, decoded in zip(batch.keys, batch.decoded, strict=True):
            clip = next(pixels) if decoded else None
            if key not in self._latents:  # a known clip may have been decoded ahead of that
                assert clip is not None
                self._latents[key] = vae.encode(clip[None])[0].float()
        return torch.stack([self._latents[key] for key in batch.keys])


class CachedTextEncoder(TextEncoder):
    """A text encoder that knows the captions of a cache and no others; it needs no weights."""

    def __init__(self, cache: TextCache, config: TextConfig) -> None:
        self.config = config
        self._cache = cache

    @classmethod
    def open(cls, path: str | Path, config: TextConfig) -> CachedTextEncoder:
        """Open what `kinema text encode` wrote, of prompts or of a manifest.

        Raises:
            KinemaError: no cache, or one of other settings.
        """
        return cls(TextCache.open(path, None, to_dict(config)), config)

    @property
    def weights_id(self) -> str | None:
        return self._cache.weights

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """See `TextEncoder.encode`.

        Raises:
            KinemaError: captions that the cache does not have.
        """
        found, kept = self._cache.features(self._cache.find(texts))
        y = torch.zeros(len(texts), 1, self.config.max_tokens, self._cache.dim)
        mask = torch.zeros(len(texts), self.config.max_tokens, dtype=torch.bool)
        length = min(kept.shape[1], self.config.max_tokens)  # no captions: one empty place
        y[:, 0, :length] = torch.from_numpy(found)[:, :length]
        mask[:, :length] = torch.from_numpy(kept)[:, :length]
        return TextFeatures(y, mask)

    def check(self, texts: Sequence[str]) -> None:
        """See `TextEncoder.check`."""
        self._cache.find(texts)

    def lost(self, text: str) -> str:
        """Nothing: what did not fit was said when the cache was written."""
        return ""


@dataclass(frozen=True)
class CutCaptions:
    """Captions that the encoder could not take whole."""

    count: int
    row: int
    """The first of them."""
    lost: str
    """Its end that is lost."""


def write_text_cache(
    captions: Manifest | Sequence[str],
    encoder: TextEncoder,
    path: Path,
    *,
    dtype: str = "float16",
    batch_size: int = 16,
) -> CutCaptions | None:
    """Encode captions into a cache that `text_cache` of a recipe names; goes on where an earlier
    run of the same work was stopped.

    Args:
        captions: a manifest, all rows of which are encoded, or captions themselves.
        path: the folder to make; appears when it is complete.
        dtype: `float16` or `float32`.

    Returns:
        What did not fit into `max_tokens` of the captions encoded now; None: all did.

    Raises:
        KinemaError: the encoder cannot run, needs no cache, or the folder cannot be written.
    """
    config = encoder.config
    if isinstance(config, (CLIPTextConfig, ClassTextConfig)):
        raise KinemaError(
            f"the text encoder {config.type!r} costs next to nothing and needs no cache",
            where="text.type",
            hint="train without text_cache",
        )
    caption: Callable[[int], str]
    if isinstance(captions, Manifest):
        hashes, caption = manifest_hashes(captions), captions.text
    else:
        hashes, caption = caption_hashes(captions), captions.__getitem__
    writer = TextCacheWriter(
        path, hashes, to_dict(config), weights=encoder.weights_id, dim=config.dim, dtype=dtype
    )
    cut: CutCaptions | None = None
    with writer as cache:
        first, total = cache.rows, len(captions)
        with Progress("encoding captions", total=total, unit="caption", done=first) as bar:
            for start in range(first, total, batch_size):
                rows = range(start, min(start + batch_size, total))
                texts = [caption(row) for row in rows]
                found = encoder.encode(texts)
                assert found.mask is not None
                cache.append(found.y[:, 0].numpy(), found.mask.numpy())
                for row, text in zip(rows, texts, strict=True):
                    if lost := encoder.lost(text):
                        cut = (
                            replace(cut, count=cut.count + 1) if cut else CutCaptions(1, row, lost)
                        )
                bar.advance(len(rows))
    return cut
