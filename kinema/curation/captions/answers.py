"""From a model's answer to a caption's columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from kinema.curation.captions.clean import (
    Unusable,
    cleaned,
    count_words,
    first_sentence,
    repeats,
    unusable,
)
from kinema.curation.captions.prompts import STRUCTURED_FIELDS, Template, spoken
from kinema.curation.config import CaptionConfig
from kinema.endpoint.chat import unwrapped
from kinema.models.score_words import add_scores

FIELD_WORDS = 40
"""Words that a field of a structured caption keeps at most."""
NO_LABEL = ("", "unknown", "mixed")
"""Values of `camera_motion` that say nothing a model could learn to follow."""
_ASIDE = tuple(name for name in STRUCTURED_FIELDS if name not in ("short", "dense"))


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    text: str
    cut_off: bool = False
    """It ran into `max_tokens`."""


@dataclass
class Use:
    """What captions of a clip have used of a model so far."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, tokens_in: int, tokens_out: int) -> None:
        self.requests += 1
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out


@dataclass(frozen=True)
class Caption:
    """A caption that may be used."""

    text: str
    short: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


def read_answer(answer: Answer, template: Template, config: CaptionConfig) -> Caption | Unusable:
    """The caption in an answer, or why there is none."""
    text = unwrapped(answer.text)
    if template.fields:
        return _structured(text, answer.cut_off, config)
    caption = cleaned(text, max_words=config.max_words, cut_off=answer.cut_off)
    if answer.cut_off and text and not caption and not unusable(text, text, max_words=10**6):
        return Unusable("cut_off", "the answer was cut off (max_tokens) within its first sentence")
    bad = unusable(text, caption, max_words=config.max_words)
    return bad or Caption(caption, first_sentence(caption) if config.short else None)


def read_short(answer: Answer, long: str) -> str:
    """The model's shortening of a caption; its first sentence where that is of no use."""
    text = unwrapped(answer.text)
    short = first_sentence(cleaned(text, cut_off=answer.cut_off))
    words = count_words(short)
    fits = words <= max(30, count_words(first_sentence(long)))
    return short if fits and not unusable(text, short, max_words=60) else first_sentence(long)


def _structured(text: str, cut_off: bool, config: CaptionConfig) -> Caption | Unusable:
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        if cut_off:
            return Unusable("cut_off", "the JSON was cut off (max_tokens)")
        return unusable(text, text, max_words=10 * config.max_words) or Unusable(
            "not_json", "the answer is no JSON object"
        )
    raw = {name: " ".join(str(found.get(name) or "").split()) for name in STRUCTURED_FIELDS}
    dense = cleaned(raw["dense"], max_words=config.max_words)
    if bad := unusable(raw["dense"], dense, max_words=config.max_words):
        return bad
    aside = {f"caption_{n}": " ".join(raw[n].split()[:FIELD_WORDS]) for n in _ASIDE}
    return Caption(dense, first_sentence(cleaned(raw["short"])) or first_sentence(dense), aside)


def columns_of(template: Template, config: CaptionConfig) -> dict[str, pa.DataType]:
    """The columns that captions give, with their types."""
    short = {"text_short": pa.string()} if config.short or template.fields else {}
    aside = {f"caption_{name}": pa.string() for name in _ASIDE} if template.fields else {}
    return {
        "text": pa.string(),
        **short,
        **aside,
        "caption_model": pa.string(),
        "caption_words": pa.int32(),
        "caption_repeats": pa.float64(),
        "_requests": pa.int32(),
        "_tokens_in": pa.int64(),
        "_tokens_out": pa.int64(),
    }


def as_columns(
    caption: Caption, columns: Mapping[str, pa.DataType], model: str | None, use: Use
) -> dict[str, Any]:
    """Values for the columns.

    Args:
        columns: as `columns_of` gives them.
        model: which wrote it; None: the clip came with it.
    """
    values = {
        "text": caption.text,
        "text_short": caption.short,
        **caption.fields,
        "caption_model": model,
        "caption_words": count_words(caption.text),
        "caption_repeats": round(repeats(caption.text), 4),
        "_requests": use.requests,
        "_tokens_in": use.tokens_in,
        "_tokens_out": use.tokens_out,
    }
    return {name: values.get(name) for name in columns}


SCORES = ("aesthetic", "flow", "camera_motion")
"""Columns that `with_scores` looks at."""


def with_scores(text: str, row: Mapping[str, Any]) -> str:
    """A caption with the row's scores appended (`score_text`), for the manifest; a score that the
    row does not have is left out.

    The motion score is the row's `flow`, the camera's motion its `camera_motion` in words.
    """
    camera = row.get("camera_motion")
    said = None if camera is None or camera in NO_LABEL else spoken(str(camera))
    return add_scores(text, row.get("aesthetic"), row.get("flow"), said)
