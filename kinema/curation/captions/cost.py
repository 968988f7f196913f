"""What captions will cost and have cost, in tokens and money.

The estimate counts the images by OpenAI's published rule of tiles, unless `image_tokens` says how
many tokens a frame is: with `detail: low` 85; else a frame is shrunk to fit 2048 × 2048 and to a
shorter side of 768, and costs 85 and 170 for each tile of 512 × 512 that it touches. Text is
counted at four characters a token, answers at what the template usually gives (4 tokens for 3
words). Other models count otherwise: what an endpoint says it used replaces the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kinema.curation.captions.prompts import SHORTEN, Template, ask_for, template_of
from kinema.curation.config import CaptionConfig, FramesConfig
from kinema.curation.frames import strip_size

LOW, BASE, TILE = 85, 85, 170
LARGEST, SHORTER, TILE_SIDE = 2048, 768, 512
CHARACTERS, MESSAGE = 4, 10
"""Characters of a token; tokens of a message beside its text."""


@dataclass(frozen=True)
class Cost:
    """Tokens, and their price where prices are known."""

    videos: int
    tokens_in: int
    tokens_out: int
    price: float | None
    currency: str

    def __str__(self) -> str:
        """`1,000 videos: 1.4M tokens in, 0.15M out, about 0.44 USD (0.00044 a video)`, say."""
        text = (
            f"{self.videos:,} video{'' if self.videos == 1 else 's'}: "
            f"{_short(self.tokens_in)} tokens in, {_short(self.tokens_out)} out"
        )
        if self.price is None:
            return text
        each = f" ({_money(self.price / self.videos)} a video)" if self.videos else ""
        return f"{text}, {_money(self.price)} {self.currency}{each}"


def estimate(
    rows: Iterable[Mapping[str, Any]], config: CaptionConfig, frames: FramesConfig
) -> Cost | None:
    """What captions of these clips will use, before any is asked for; None: no endpoint is asked.

    Args:
        rows: those without a result; with `existing: keep`, the ones that have a text count
            nothing.
    """
    if config.endpoint is None:
        return None
    template = template_of(config.prompt)
    videos = tokens_in = tokens_out = 0
    for row in rows:
        if keeps(row, config):
            continue
        needed = for_row(row, template, config, frames)
        videos, tokens_in, tokens_out = videos + 1, tokens_in + needed[0], tokens_out + needed[1]
    price = price_of(tokens_in, tokens_out, config)
    return Cost(videos, tokens_in, tokens_out, price, config.currency)


def spent(found: Iterable[Mapping[str, Any]], config: CaptionConfig) -> Cost | None:
    """What captions have used, by their columns `_tokens_in` and `_tokens_out`; None: no endpoint
    was asked. Captions that clips came with count nothing."""
    if config.endpoint is None:
        return None
    asked = [row for row in found if row.get("_requests")]
    tokens_in = sum(int(row["_tokens_in"] or 0) for row in asked)
    tokens_out = sum(int(row["_tokens_out"] or 0) for row in asked)
    price = price_of(tokens_in, tokens_out, config)
    return Cost(len(asked), tokens_in, tokens_out, price, config.currency)


def for_row(
    row: Mapping[str, Any], template: Template, config: CaptionConfig, frames: FramesConfig
) -> tuple[int, int]:
    """Tokens in and out for one clip."""
    shown = min(config.frames, frames.count)
    height, width = shown_size(row, frames)
    question = len(ask_for(template, row, shown)) // CHARACTERS + MESSAGE
    answer = min(config.max_tokens, template.words * 4 // 3)
    tokens_in = question + shown * image_tokens(height, width, config)
    if config.short == "asked" and not template.fields:
        tokens_in += len(SHORTEN) // CHARACTERS + MESSAGE + answer
        return tokens_in, answer + 27
    return tokens_in, answer


def image_tokens(height: int, width: int, config: CaptionConfig) -> int:
    """Tokens of a picture, by the rule above."""
    if config.image_tokens is not None:
        return config.image_tokens
    if config.detail == "low":
        return LOW
    scale = min(1.0, LARGEST / max(height, width))
    scale *= min(1.0, SHORTER / (min(height, width) * scale))
    # A rounding error must not make a tile of its own.
    down, across = (math.ceil(round(side * scale, 3) / TILE_SIDE) for side in (height, width))
    return BASE + TILE * down * across


def shown_size(row: Mapping[str, Any], frames: FramesConfig) -> tuple[int, int]:
    """(height, width) of a clip's frames in its strip; 16:9 where the row does not say."""
    height, width = int(row.get("height") or 9 << 8), int(row.get("width") or 16 << 8)
    return strip_size(height, width, frames.max_side)


def price_of(tokens_in: float, tokens_out: float, config: CaptionConfig) -> float | None:
    if config.price_per_million_input is None or config.price_per_million_output is None:
        return None
    return (
        tokens_in * config.price_per_million_input + tokens_out * config.price_per_million_output
    ) / 1e6


def keeps(row: Mapping[str, Any], config: CaptionConfig) -> bool:
    """Whether the caption that a clip came with stays."""
    return config.existing == "keep" and bool(str(row.get("text") or "").strip())


def _short(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens >= 1e6 else f"{tokens:,}"


def _money(price: float) -> str:
    """With two digits that say something."""
    if price == 0 or price >= 0.1:
        return f"{price:.2f}"
    return f"{price:.{1 - math.floor(math.log10(price))}f}"
