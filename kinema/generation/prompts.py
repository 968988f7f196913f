"""What a prompt may carry besides its text: references, segments, scores (Open-Sora 1.1 and 1.2).

`a text {"reference_path": "a.png;b.mp4", "mask_strategy": "0"}` brings its own references, and
`|0| by day |2| by night` gives segments their own texts, each up to the next one's start.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kinema.config.errors import KinemaError
from kinema.models.score_words import add_scores

JSON_KEYS = ("reference_path", "mask_strategy")


class PromptError(KinemaError):
    """A prompt, or a file of prompts, that cannot be read."""

    exit_code = 2


class TextOfRequest(Protocol):
    """The part of a request that says what the text encoder gets."""

    @property
    def prompt(self) -> str: ...
    @property
    def loop(self) -> int: ...
    @property
    def aes(self) -> float | None: ...
    @property
    def flow(self) -> float | None: ...
    @property
    def camera_motion(self) -> str | None: ...


@dataclass(frozen=True)
class PromptLine:
    """A prompt as a person wrote it, taken apart."""

    text: str
    references: tuple[str, ...] | None = None
    """Paths; None where the prompt says nothing of them."""
    mask_strategy: str | None = None


def segment_texts(request: TextOfRequest) -> list[str]:
    """What the text encoder gets for each of the segments `0..loop-1`, with the scores.

    Raises:
        PromptError: segments that are out of order or that the request does not have.
    """
    _, starts = split_segments(request.prompt)
    if starts is not None and starts[-1] >= request.loop:
        last = request.loop - 1
        there = f"are segments 0 to {last}" if last else "is only segment 0"
        raise PromptError(
            f"the prompt has a text for segment {starts[-1]}, but there {there}",
            where="prompt",
            hint=f"--loop {starts[-1] + 1} or more",
        )
    scores = (request.aes, request.flow, request.camera_motion)
    return [
        add_scores(text_of_segment(request.prompt, segment), *scores)
        for segment in range(request.loop)
    ]


def split_segments(prompt: str) -> tuple[list[str], list[int] | None]:
    """Texts and the segments at which they start; no starts if the prompt is one text.

    As `split_prompt` of 1.2: only a prompt that begins with `|0|` is taken apart.

    Raises:
        PromptError: a start that is no number, without a text, or not above the one before.
    """
    if not prompt.startswith("|0|"):
        return [prompt], None
    pieces = prompt.split("|")[1:]
    if len(pieces) % 2:
        raise PromptError(
            f"segment {pieces[-1].strip()!r} has no text", where=_quote(prompt), hint="|0| a |2| b"
        )
    try:
        starts = [int(p) for p in pieces[::2]]
    except ValueError:
        raise PromptError(
            "a segment's start is no number", where=_quote(prompt), hint="|0| a text |2| another"
        ) from None
    for before, after in itertools.pairwise(starts):
        if after <= before:
            raise PromptError(
                f"segment {after} comes after segment {before}",
                where=_quote(prompt),
                hint="starts that grow: |0| a text |2| another",
            )
    return [p.strip() for p in pieces[1::2]], starts


def join_segments(texts: Sequence[str], starts: Sequence[int] | None) -> str:
    """The prompt that `split_segments` takes apart (`merge_prompt` of 1.2)."""
    if starts is None:
        return texts[0]
    return "".join(f"|{start}|{text}" for start, text in zip(starts, texts, strict=True))


def text_of_segment(prompt: str, segment: int) -> str:
    """The text of one segment (`extract_prompts_loop` of 1.2, without spaces at its ends)."""
    texts, starts = split_segments(prompt)
    # The last one that has started.
    return texts[0 if starts is None else sum(start <= segment for start in starts) - 1]


def split_json(prompt: str) -> PromptLine:
    """A prompt apart from the JSON object at its end, if it has one.

    Raises:
        PromptError: no such object after `{`, or keys other than `reference_path` and
            `mask_strategy`.
    """
    text, brace, rest = prompt.partition("{")
    if not brace:
        return PromptLine(text)
    hint = '{"reference_path": "a.png", "mask_strategy": "0"} at the end of the prompt'
    try:
        found = json.loads(brace + rest)
    except ValueError as error:
        raise PromptError(
            f"what begins with {{ is no JSON object ({error})", where=_quote(prompt), hint=hint
        ) from None
    unknown = sorted(found.keys() - set(JSON_KEYS))
    if unknown:
        raise PromptError(
            f"unknown key {unknown[0]!r}", where=_quote(prompt), hint=" or ".join(JSON_KEYS)
        )
    for key, value in found.items():
        if not isinstance(value, str | None):
            raise PromptError(f"{key} is {value!r}, not a text", where=_quote(prompt), hint=hint)
    paths = found.get("reference_path")
    return PromptLine(
        text,
        references=None if paths is None else split_references(paths),
        mask_strategy=found.get("mask_strategy"),
    )


def split_references(paths: str) -> tuple[str, ...]:
    """`a.png;b.mp4` as two paths; none for an empty text."""
    return tuple(p for p in (part.strip() for part in paths.split(";")) if p)


def read_prompts(path: Path) -> list[PromptLine]:
    """Prompts of a file, empty lines left out.

    `.csv` has a header, with `prompt` (or `text`) and, if wanted, `reference_path` and
    `mask_strategy`; `.jsonl` has objects with these keys; anything else has a prompt per line.

    Raises:
        PromptError: not UTF-8, no prompt in it, unknown columns, or a line that cannot be read.
        OSError: the file cannot be read.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise PromptError("is not a UTF-8 text file", where=str(path)) from None
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise PromptError(
            "is one JSON document; prompts come as one object per line",
            where=str(path),
            hint="a .jsonl, .csv or .txt file",
        )
    if suffix == ".csv":
        try:
            rows = list(csv.DictReader(io.StringIO(content)))
        except csv.Error as error:
            raise PromptError(f"is no CSV ({error})", where=str(path)) from None
        found = [_row(row, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]
    elif suffix == ".jsonl":
        found = [_json_line(line, where) for line, where in _lines(content, path)]
    else:
        found = [_located(line, where) for line, where in _lines(content, path)]
    if not found:
        raise PromptError("holds no prompt", where=str(path), hint="one prompt per line")
    return found


def _lines(content: str, path: Path) -> list[tuple[str, str]]:
    lines = enumerate(content.splitlines(), start=1)
    return [(line.strip(), f"{path}, line {i}") for i, line in lines if line.strip()]


def _located(prompt: str, where: str) -> PromptLine:
    try:
        return split_json(prompt)
    except PromptError as error:
        raise PromptError(error.what, where=where, hint=error.hint) from None


def _json_line(line: str, where: str) -> PromptLine:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise PromptError(f"is no JSON ({error})", where=where) from None
    if not isinstance(row, dict):
        raise PromptError("is no JSON object", where=where, hint='{"prompt": "a red kite"}')
    return _row(row, where)


def _row(row: dict[Any, Any], where: str) -> PromptLine:
    known = ("prompt", "text", *JSON_KEYS)
    unknown = [key for key in row if key not in known]
    if unknown:
        raise PromptError(f"unknown column {unknown[0]!r}", where=where, hint=", ".join(known))
    text = row.get("prompt") or row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise PromptError("has no prompt", where=where, hint="a column `prompt`")
    line = _located(text.strip(), where)
    paths, strategy = row.get("reference_path"), row.get("mask_strategy")
    for key, value in (("reference_path", paths), ("mask_strategy", strategy)):
        if not isinstance(value, str | None):
            raise PromptError(f"{key} is {value!r}, not a text", where=where)
    return PromptLine(
        line.text,
        references=split_references(paths) if paths else line.references,
        mask_strategy=strategy or line.mask_strategy,
    )


def _quote(prompt: str) -> str:
    return f"prompt {prompt if len(prompt) <= 60 else prompt[:57] + '...'!r}"
