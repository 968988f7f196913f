"""Captions to features: what every encoder does, and the one that needs no weights."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinema.models.config import HashTextConfig, TextConfig

_WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
_BEGIN = "<begin>"  # no word can be spelled so: `<` is a word by itself

# Shares of the variance: the word itself, its spelling, its place in the caption.
_WORD_SHARE, _SPELLING_SHARE, _PLACE_SHARE = 0.66, 0.30, 0.04


@dataclass(frozen=True)
class TextFeatures:
    """What a caption is to the transformer."""

    y: Tensor
    """Tokens `[B, 1, L, D]` fp32, zero where the mask is False; a pooled vector `[B, 1, D]` fp32
    (CLIP); or the number of a class, int64 `[B]`."""
    mask: Tensor | None
    """`[B, L]` bool on the CPU, True = keep, at least one per caption; None where there are no
    tokens."""


class TextEncoder(ABC):
    """Turns captions into features, always the same for the same caption.

    A caption's features do not depend on the captions beside it. Networks of gigabytes are read
    when they are first needed, so making an encoder is cheap and checks its files.
    """

    config: TextConfig

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Features of captions, on the CPU; of a longer caption only its beginning counts.

        Raises:
            KinemaError: weights that do not fit, a class out of range.
        """

    @abstractmethod
    def lost(self, text: str) -> str:
        """The end of the caption that does not fit into `max_tokens`; "" if all of it fits.

        It is shown as the encoder reads it, that is in lower case or cleaned.
        """

    def check(self, texts: Sequence[str]) -> None:
        """Whether `encode` can take these captions, known without weights.

        Raises:
            KinemaError: it cannot.
        """
        return None

    @property
    def weights_id(self) -> str | None:
        """Names the weights behind the features by their content; None: there are none."""
        return None

    @property
    def memory_bytes(self) -> int:
        """What the weights take in memory, known without loading them."""
        return 0

    def to(self, device: torch.device | str) -> None:
        """Have the network on this device: where `encode` computes from now on."""
        return None  # nothing to move where there is no network

    def free(self) -> None:
        """Give the network's memory back; the next `encode` reads the weights again."""
        return None


class HashTextEncoder(TextEncoder):
    """Every word has a fixed pseudo-random vector: nothing to download, the same everywhere.

    Components have variance one. Words that share spelling (circle, circles) are near, other
    words as good as orthogonal; meaning is left to the transformer to learn. The first token is
    a begin marker, so that an empty caption is one token long.
    """

    config: HashTextConfig

    def __init__(self, config: HashTextConfig) -> None:
        self.config = config

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """See `TextEncoder.encode`."""
        dim, limit = self.config.dim, self.config.max_tokens
        features = np.zeros((len(texts), 1, limit, dim), dtype=np.float32)
        mask = np.zeros((len(texts), limit), dtype=bool)
        for row, text in enumerate(texts):
            tokens = [_BEGIN, *split_words(text)]
            for place, token in enumerate(tokens[:limit]):
                features[row, 0, place] = _word_vector(token, dim) + _place_vector(place, dim)
                mask[row, place] = True
        return TextFeatures(torch.from_numpy(features), torch.from_numpy(mask))

    def lost(self, text: str) -> str:
        """See `TextEncoder.lost`."""
        normal = _normal(text)
        starts = [found.start() for found in _WORD.finditer(normal)]
        fits = self.config.max_tokens - 1  # the begin marker takes a place
        return normal[starts[fits] :].rstrip() if len(starts) > fits else ""


def split_words(text: str) -> list[str]:
    """Lower-case words, and punctuation marks each for itself."""
    return _WORD.findall(_normal(text))


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


@functools.lru_cache(maxsize=65536)
def _word_vector(word: str, dim: int) -> NDArray[np.float32]:
    edged = f"^{word}$"
    trigrams = [edged[i : i + 3] for i in range(len(edged) - 2)]
    spelling = sum(_noise("trigram", t, dim) for t in trigrams) / np.sqrt(len(trigrams))
    vector = _WORD_SHARE**0.5 * _noise("word", word, dim) + _SPELLING_SHARE**0.5 * spelling
    return np.asarray(vector, dtype=np.float32)


@functools.lru_cache(maxsize=4096)
def _place_vector(place: int, dim: int) -> NDArray[np.float32]:
    return (_PLACE_SHARE**0.5 * _noise("place", str(place), dim)).astype(np.float32)


def _noise(purpose: str, key: str, dim: int) -> NDArray[np.float64]:
    """`dim` uniform numbers of mean 0 and variance 1 that depend on the key alone.

    Straight from a hash, in exact arithmetic: no library's generator or logarithm decides.
    """
    digest = hashlib.shake_256(f"kinema text 1/{purpose}/{key}".encode()).digest(2 * dim)
    numbers = np.frombuffer(digest, dtype="<u2").astype(np.float64)
    return (numbers - 32767.5) / (65536 / 12**0.5)
