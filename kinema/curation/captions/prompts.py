"""What a vision-language model is asked: ready templates, and texts of people's own.

A template may hold `{placeholders}` for what is known of the clip; see `PLACEHOLDERS`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

PLACEHOLDERS: Mapping[str, tuple[str, str]] = {
    "frames": ("", "how many frames are shown"),
    "duration": ("duration", "length of the clip in seconds, one decimal"),
    "width": ("width", "pixels"),
    "height": ("height", "pixels"),
    "fps": ("fps", "frames per second"),
    "camera_motion": ("camera_motion", "what `motion` found: pan left, static, ..."),
    "text": ("text", "the caption that the clip came with"),
    "ocr_text": ("ocr_text", "text on screen, as `ocr` read it"),
}
"""Name -> (the column it is taken from, what it is)."""
UNKNOWN = "unknown"
"""What stands for a value that a row does not have."""

_FRAMES = (
    "You see {frames} frames of one video clip of {duration} seconds, in order of time, evenly "
    "spread. "
)
_RULES = (
    " Write plain text in the present tense, without lists, headings or remarks. Describe only "
    "what can be seen; do not guess what is out of view. Do not speak of frames, images or the "
    "video itself: begin with what is in it."
)


@dataclass(frozen=True)
class Template:
    """A question to the model."""

    text: str
    words: int
    """Words of a usual answer: what a cost estimate counts with."""
    fields: tuple[str, ...] = ()
    """Keys of the JSON object that is the answer; none: the answer is the caption."""


STRUCTURED_FIELDS = ("short", "dense", "background", "style", "shot", "lighting", "atmosphere")
"""As HunyuanVideo's captions are taken apart (arXiv 2412.03603, section 3.2)."""

TEMPLATES: Mapping[str, Template] = {
    "detailed": Template(
        _FRAMES + "Describe the clip in one paragraph of 60 to 120 words: the subjects and how "
        "they look, what they do and how that goes on from first to last frame, the place and "
        "background, the light and colours, the style, and how the camera is held or moves."
        + _RULES,
        110,
    ),
    "short": Template(
        _FRAMES + "Describe the clip in one sentence of at most 25 words: who or what is there, "
        "what happens, and where." + _RULES,
        22,
    ),
    "camera": Template(
        _FRAMES + "A measurement of the picture's movement says that the camera's motion is: "
        "{camera_motion}. Describe the clip in 50 to 100 words, and give half of them to the "
        "camera: size of shot, angle, what it follows, and its movement, which must agree with the "
        "measurement unless that says unknown." + _RULES,
        95,
    ),
    "improve": Template(
        _FRAMES + "It came with this caption: {text}\nWrite one of 50 to 100 words that keeps what "
        "is right in it, above all names and actions, leaves out what the frames contradict, and "
        "adds what they show." + _RULES,
        95,
    ),
    "structured": Template(
        _FRAMES + "Answer with one JSON object and nothing else, with these keys, each a string in "
        'plain English: "short" (one sentence, at most 25 words), "dense" (60 to 120 words: '
        "subjects, actions in the order in which they happen, place, and how the camera moves), "
        '"background" (at most 20 words), "style" (documentary, animation, ...), "shot" (size, '
        'angle and movement of the shot), "lighting", "atmosphere" (at most 8 words each).'
        + _RULES,
        190,
        STRUCTURED_FIELDS,
    ),
}
"""Ready ones, by the name that `caption.prompt` takes."""

SHORTEN = (
    "Shorten this description of a video clip to one sentence of at most 20 words. Keep who or "
    "what is there, what happens and where; add nothing. Answer with the sentence alone.\n\n"
)
"""What is asked for a short caption, in front of the long one."""


def template_of(prompt: str) -> Template:
    """The ready template of that name, or the text as a template of its own.

    Raises:
        ValueError: one word that is no template's name, or a placeholder that is not known.
    """
    if prompt in TEMPLATES:
        return TEMPLATES[prompt]
    if not prompt.strip() or len(prompt.split()) == 1:
        raise ValueError(
            f"prompt is {prompt!r}, which is no ready template"
            + _nearest(prompt, TEMPLATES)
            + "; or write what the model is to be asked, in more than one word"
        )
    placeholders(prompt)
    return Template(prompt, 110)


def placeholders(text: str) -> tuple[str, ...]:
    """Names in braces, each once, in order.

    Raises:
        ValueError: braces that do not close, or a name that is not known.
    """
    try:
        found = [(name, spec, cast) for _, name, spec, cast in string.Formatter().parse(text)]
    except ValueError as error:
        raise ValueError(f"prompt: {error}; {{{{ and }}}} stand for braces themselves") from None
    names = []
    for name, spec, cast in found:
        if name is None:
            continue
        if name not in PLACEHOLDERS or spec or cast:
            raise ValueError(
                f"prompt: unknown placeholder {{{name}}}"
                + _nearest(name, PLACEHOLDERS)
                + "; {{ and }} stand for braces themselves"
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def columns(text: str) -> tuple[str, ...]:
    """The columns whose values the question depends on, sorted."""
    return tuple(sorted({PLACEHOLDERS[name][0] for name in placeholders(text)} - {""}))


def ask_for(template: Template, row: Mapping[str, Any], frames: int) -> str:
    """The question about one clip.

    Args:
        frames: how many of its frames the model is shown.
    """
    values = {
        name: str(frames) if name == "frames" else _shown(name, row.get(column))
        for name, (column, _) in PLACEHOLDERS.items()
    }
    # format_map evaluates nothing but names here: `placeholders` let no others pass.
    return template.text.format_map(values)


def _shown(name: str, value: object) -> str:
    if value is None or value == "":
        return UNKNOWN
    as_text = _FORMS.get(name)
    return as_text(value) if as_text else " ".join(str(value).split())


_FORMS: Mapping[str, Callable[[Any], str]] = {
    "duration": lambda v: f"{v:.1f}",
    "fps": lambda v: f"{v:g}",
    "camera_motion": lambda v: spoken(str(v)),
}


def spoken(label: str) -> str:
    """A label of `camera_motion` in words: `pan_left` is `pan left`."""
    return label.replace("_", " ")


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = get_close_matches(name.lower(), known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f" (known: {', '.join(known)})"
