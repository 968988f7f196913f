"""Captions as training wants them, out of answers as vision-language models give them.

`cleaned` takes off what is not about the picture: openings ("The video shows"), markup, remarks
about frames, sentences that come twice, what `max_tokens` cut off. `unusable` says why an answer
is no caption at all. Nothing is lowered or unaccented here: text encoders clean further when
they read (`kinema.models.text_cleaning`).
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

VERSION = 1
"""Of these rules; results of older ones are found anew."""
MIN_WORDS = 3
LOOP_SHARE = 0.5
"""Repeated four-word groups from which a text counts as a loop."""
LOOP_WORDS = 16
"""Shorter texts are too short to be one."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+(?:['\u2019-]\w+)*")
_ABBREVIATIONS = "".join(
    rf"(?<!\b{word})" for word in ("[A-Z]", "Mr", "Mrs", "Ms", "Dr", "St", "vs", r"e\.g", r"i\.e")
)
_END = re.compile(
    rf"(?:{_ABBREVIATIONS}\.|[!?\u2026])[\"'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]"
)
_PICTURE = (
    r"(?:(?:short|given|provided|input|above)\s+)?"
    r"(?:video(?:\s+(?:clip|sequence|footage))?|clip|footage|image|picture|photo(?:graph)?|"
    r"frames?|still|scene|sequence(?:\s+of\s+(?:frames|images))?|series\s+of\s+(?:frames|images)|"
    r"(?:\w+\s+)?(?:images|frames))"
    r"(?:,\s(?:lasting|which|taken|shot|filmed|recorded|set)\s[^,.]{1,40},)?"
)
_SHOWS = (
    r"(?:(?:also|then|clearly|vividly|mainly|primarily|seems?\s+to)\s+)?"
    r"(?:shows?|showing|captures?|features?|depicts?|presents?|portrays?|displays?|illustrates?|"
    r"showcases?|contains?|(?:begins|starts|opens)\s+with|is\s+(?:of|about|showing)|are\s+of|"
    r"is(?=\s+(?:an?|the)\s)|appears?\s+to\s+(?:show|be\s+of|depict))"
)
_SMALL_TALK = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:sure|certainly|of\s+course|okay|ok|absolutely|great)(?:\s+thing)?\s*[,!.:]\s*",
        r"(?:here(?:'s|\u2019s|\s+is|\s+are)|below\s+is|this\s+is)\s+(?:a|an|the|your|my|one)\b"
        r"[^.:\n]{0,60}\b(?:caption|description|summary|paragraph|sentence)\b[^.:\n]{0,60}:\s*",
        r"the\s+following\s+is\s+(?:a|the)\s+(?:caption|description)\b[^.:\n]{0,40}:\s*",
        r"(?:(?:detailed|short|long|dense|video|image)\s+)?"
        r"(?:caption|description|summary|answer|output|response)\s*:\s*",
    )
)
"""In front of a caption."""
_OPENINGS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?:in|throughout|across|over|from|based\s+on)\s+(?:the|this|these|all)\s+{_PICTURE}"
        r"(?:\s+provided)?,?\s+(?:(?:we|you|one)\s+(?:can\s+)?see\s+|(?:there\s+(?:is|are)\s+))?",
        rf"(?:the|this|these)\s+{_PICTURE}\s+{_SHOWS}\s+(?:that\s+)?"
        r"(?!(?:how|what|why|where|when)\b)",
        r"(?:we|you)\s+(?:can\s+)?see\s+",
        r"(?:frame|image)\s+\d{1,2}\s*:\s*",
    )
)
"""In front of any sentence of it."""
_FRAME = r"(?:frame|image|picture)"
_FIRST, _NEXT = r"(?:first|initial|opening)", r"(?:second|next|middle|following|subsequent)"
_LAST = r"(?:third|fourth|last|final)"
_FRAME_TIMES = tuple(
    (re.compile(pattern, re.IGNORECASE), words)
    for pattern, words in (
        (rf"\b(?:in|by|at)\s+the\s+{_FIRST}\s+{_FRAME}\b", "at first"),
        (rf"\b(?:in|by|at)\s+the\s+{_NEXT}\s+{_FRAME}s?\b", "then"),
        (rf"\b(?:in|by|at)\s+the\s+{_LAST}\s+{_FRAME}\b", "in the end"),
        (rf"^the\s+{_FIRST}\s+{_FRAME}\s+{_SHOWS}\s", "at first, "),
        (rf"^the\s+{_NEXT}\s+{_FRAME}\s+{_SHOWS}\s", "then, "),
        (rf"^the\s+{_LAST}\s+{_FRAME}\s+{_SHOWS}\s", "in the end, "),
        (rf"^the\s+{_PICTURE}\s+(?:ends|concludes|closes)\s+with\s", "in the end, "),
        (
            rf"\bas\s+the\s+{_PICTURE}\s+(?:progresses|continues|unfolds|goes\s+on)\b",
            "then",
        ),
        (rf",\s+(?:the|this)\s+{_PICTURE}\s+{_SHOWS}\s", ", "),
        (
            r",?\s*(?:as\s+(?:seen|shown)\s+)?(?:across|throughout|in\s+all(?:\s+of)?)\s+"
            r"(?:the\s+|all\s+(?:the\s+)?)?(?:\w+\s+)?(?:frames?|images)\b",
            "",
        ),
    )
)
_REMARK = re.compile(
    r"(?:^(?:let\s+me\s+know|i\s+hope|please\s+(?:note|let)|feel\s+free|note\s*:|note\s+that|"
    r"disclaimer|would\s+you\s+like|do\s+you\s+want|if\s+you\s+(?:need|want|have|would)|"
    r"based\s+on\s+(?:the|these)\s+(?:\w+\s+)?(?:frames|images)\s*[.,:]?\s*$))"
    r"|\b(?:cannot|can't|can\s*not|not\s+possible\s+to|impossible\s+to|difficult\s+to|hard\s+to)\s+"
    r"(?:be\s+)?(?:determined?|tell|identif(?:y|ied)|say|know)\b"
    r"|\b(?:sequence|series|collage|composite|set)\s+of\s+(?:\w+\s+)?(?:frames|images|stills)\b"
    r"|^(?:this|the)\s+(?:caption|description)\b"
    r"|^(?:the|these|this)\s+(?:(?:provided|given|\w+ee|two|four|five)\s+)?"
    r"(?:frames?|images?|stills?|screenshots?)\s+(?:(?:do|does|did)\s*(?:not|n't)|"
    r"(?:are|is|were|was)\s+(?:not|too|taken|stills|screenshots|from|in\s+order))\b"
    r"|\b(?:in|within|by|from)\s+the\s+(?:provided|given)\s+(?:\w+\s+)?(?:frames?|images?)\b",
    re.IGNORECASE,
)
"""Sentences that speak of the question or of what is not seen."""
_REFUSAL = re.compile(
    r"^\W*(?:(?:i['\u2019]?\s?a?m\s+)?(?:really\s+|very\s+)?sorry\b[^.]{0,20}\b(?:but|i|can)|"
    r"i\s+apologi[sz]e|unfortunately,?\s+i|"
    r"i\s+(?:can(?:not|['\u2019]t|\s+not)|am\s+(?:not\s+able|unable)|['\u2019]?m\s+(?:not\s+able|unable)|"
    r"(?:do\s+not|don['\u2019]t)\s+(?:have|see)|won['\u2019]t|will\s+not)\b|"
    r"i['\u2019]m\s+(?:not\s+able|unable)|as\s+an?\s+(?:ai|language\s+model|artificial)|"
    r"(?:no|there\s+(?:is|are)\s+no)\s+(?:images?|videos?|frames?|attachments?)\b|"
    r"(?:please|could\s+you)\s+(?:please\s+)?(?:provide|upload|share|attach|send)\b|"
    r"you\s+(?:haven['\u2019]t|have\s+not|did\s+not|didn['\u2019]t)\b)",
    re.IGNORECASE,
)
_AS_AN_AI = re.compile(
    r"\b(?:as\s+an\s+ai|i['\u2019]?m\s+an\s+ai|my\s+guidelines)\b", re.IGNORECASE
)
_HTML = re.compile(r"<(?:!doctype|html|head|body|script|div|p)\b", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*\u2022+]|\d{1,2}[.)])\s+")
_HEADING = re.compile(r"^\s*#{1,6}\s+.*$")
_LABEL = re.compile(r"^\s*\*\*[^*\n]{1,40}?:?\*\*\s*:?\s*")
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u00ab": "\u00bb"}
_NOT_SEEN = re.compile(r"[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd]")


@dataclass(frozen=True)
class Unusable:
    """Why an answer is no caption."""

    reason: str
    """A code to count by."""
    message: str
    passing: bool = False
    """Whether the endpoint is at fault and not the clip: it may be asked again another time."""


def cleaned(answer: str, *, max_words: int | None = None, cut_off: bool = False) -> str:
    """The caption in an answer, on one line.

    Args:
        max_words: longer ones end with the last sentence that is within; None: any length.
        cut_off: the model ran into its limit: what follows the last full sentence is left out.

    Returns:
        Empty where nothing is left.
    """
    text = html.unescape(unicodedata.normalize("NFC", answer))
    text = "".join(c for c in _NOT_SEEN.sub("", text) if c.isprintable() or c in "\n\t")
    text = _unquoted(_without_markup(text))
    found = sentences(_without(_SMALL_TALK, text))
    kept = [_without(_OPENINGS, s) for s in found if not _REMARK.search(s)]
    kept = [_without_frames(s) for s in kept]
    kept = _without_repeats([s for s in kept if s])
    kept = [_without_loop(s) for s in kept]
    if cut_off or (max_words is not None and sum(map(count_words, kept)) > max_words):
        kept = _within(kept, max_words)
    return _unquoted(_capital(" ".join(kept).strip()))


def unusable(answer: str, caption: str, *, max_words: int) -> Unusable | None:
    """Why an answer is no caption; None if it is one.

    Args:
        answer: as the model gave it.
        caption: what `cleaned` left of it.
        max_words: that were asked for; answers of more than three times as many are nonsense.
    """
    if not any(c.isalpha() for c in answer):
        return Unusable("empty", "the answer is empty", passing=True)
    if _HTML.match(answer.lstrip()):
        return Unusable("html", "the answer is a web page", passing=True)
    if _REFUSAL.search(answer.lstrip()[:300]) or _AS_AN_AI.search(answer):
        return Unusable("refused", f"the model declined: {_start(answer)}")
    if repeats(answer) > LOOP_SHARE:
        return Unusable("repeats", f"the answer repeats itself: {_start(answer)}")
    words = count_words(answer)
    if words > 3 * max_words:
        return Unusable("too_long", f"the answer has {words} words; {max_words} are asked for")
    if count_words(caption) < MIN_WORDS:
        return Unusable("too_short", f"no caption is left of: {_start(answer)}")
    return None


def first_sentence(text: str) -> str:
    """Of a cleaned caption."""
    found = sentences(text)
    return found[0] if found else ""


def sentences(text: str) -> list[str]:
    """A text on one line, taken apart; the last piece may be without an end."""
    text = " ".join(text.split())
    pieces, start = [], 0
    for match in _END.finditer(text):
        pieces.append(text[start : match.end()].strip())
        start = match.end()
    if text[start:].strip():
        pieces.append(text[start:].strip())
    return [p for p in pieces if any(c.isalnum() for c in p)]


def count_words(text: str) -> int:
    """Words; in scripts without spaces, characters."""
    return len(_WORD.findall(text))


def repeats(text: str) -> float:
    """The share 0..1 of a text's groups of four words that it had before."""
    words = [w.lower() for w in _WORD.findall(text)]
    if len(words) < LOOP_WORDS:
        return 0.0
    groups = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1.0 - len(set(groups)) / len(groups)


def _without_markup(text: str) -> str:
    lines = []
    for line in text.splitlines():
        item = _BULLET.match(line)
        line = _LABEL.sub("", _BULLET.sub("", _HEADING.sub("", line)))
        if item and line.strip() and line.rstrip()[-1] not in ".,;:!?":
            line = line.rstrip() + "."
        # Emphasis, code and links keep their words.
        line = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", line)
        line = re.sub(r"(\*{1,3}|_{2,3}|`+|~~)(?=\S)(.+?)(?<=\S)\1", r"\2", line)
        lines.append(line.replace("```", "").replace("**", "").strip())
    return " ".join(line for line in lines if line.strip("-*_=# "))


def _without(openings: Sequence[re.Pattern[str]], text: str) -> str:
    for _ in range(4):  # "Sure! Here is a caption: ..."
        before = text
        for opening in openings:
            if match := opening.match(text):
                rest = _unquoted(text[match.end() :].lstrip(" ,:-\u2013\u2014"))
                # It is an opening only if a sentence follows it.
                if count_words(rest) >= 2:
                    text = _capital(rest)
        if text == before:
            break
    return text


def _without_frames(sentence: str) -> str:
    for pattern, words in _FRAME_TIMES:
        sentence = pattern.sub(words, sentence)
    return _capital(" ".join(sentence.split()).lstrip(" ,"))


def _without_repeats(found: Sequence[str]) -> list[str]:
    seen: set[tuple[str, ...]] = set()
    kept = []
    for sentence in found:
        key = tuple(w.lower() for w in _WORD.findall(sentence))
        if key not in seen:
            seen.add(key)
            kept.append(sentence)
    return kept


def _without_loop(sentence: str) -> str:
    """`a man and a man and a man and ...` ends before its third round."""
    words = sentence.split()
    for size in range(1, 13):
        for start in range(len(words) - 3 * size + 1):
            group = words[start : start + size]
            rounds = 1
            while words[start + rounds * size : start + (rounds + 1) * size] == group:
                rounds += 1
            if rounds >= 3:
                kept = " ".join(words[: start + size]).rstrip(" ,;")
                rest = " ".join(words[start + rounds * size :])
                # What follows a loop is its last, broken round.
                whole = rest and not " ".join(group).startswith(rest.rstrip(".!?"))
                joined = f"{kept} {rest}" if whole else kept
                return joined if joined[-1] in ".!?" else joined + "."
    return sentence


def _within(found: Sequence[str], max_words: int | None) -> list[str]:
    """Full sentences from the first on, as many as may be."""
    kept: list[str] = []
    words = 0
    for sentence in found:
        words += count_words(sentence)
        if (max_words is not None and words > max_words) or not _END.search(sentence):
            break
        kept.append(sentence)
    return kept


def _unquoted(text: str) -> str:
    text = text.strip()
    ends, inner = text[:1] + text[-1:], text[1:-1]
    if inner and _QUOTES.get(ends[0]) == ends[1] and not any(mark in inner for mark in ends):
        return inner.strip()
    return text


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _start(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 80 else line[:77] + "...")
