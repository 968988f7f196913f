"""Caption cleaning of the T5 generations: web captions to what their models were trained on.

The rules are those that DeepFloyd IF published and that PixArt and Open-Sora 1.x took over, where
they run twice over every caption. They are applied in order, one after the other, and their
oddities are kept ("a jpg image of dogs" loses two words, "1/2" becomes "1 2"): a model knows
captions only in this form.
"""

from __future__ import annotations

import html
import re
import warnings
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

from kinema.config.errors import KinemaError

_FILE_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_TOP_LEVEL_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_CJK_BLOCKS = (
    "\u31c0-\u31ef"  # strokes
    "\u31f0-\u31ff"  # phonetic extensions of katakana
    "\u3200-\u32ff"  # enclosed letters and months
    "\u3300-\u33ff"  # compatibility
    "\u3400-\u4dbf"  # unified ideographs, extension A
    "\u4dc0-\u4dff"  # hexagrams
    "\u4e00-\u9fff"  # unified ideographs
)
_MAX_DASHES = 3
"""More dashes and underscores than this join words (this-is-my-cute-cat) and become spaces."""


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    replacement: str


def _address(protocol: str) -> str:
    """`protocol:` with a character more, or anything that ends in a well-known domain, and what
    of a path follows; not where an `@` comes next."""
    domain = rf"[a-zA-Z0-9.\-]+[.](?:{_TOP_LEVEL_DOMAINS})[\w/-]*\b/?(?!@)"
    return rf"\b(?:{protocol}:(?:/{{1,3}}|[a-zA-Z0-9%])|{domain})"


def _rules(*table: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple(_Rule(re.compile(pattern), replacement) for pattern, replacement in table)


_ADDRESSES = _rules(
    (r"<person>", "person"),  # a placeholder of a data set, no mark-up
    (_address("https?"), ""),
    (_address("www"), ""),
)
_CHARACTERS = _rules(
    (r"@[\w\d]+\b", ""),  # nicknames
    (rf"[{_CJK_BLOCKS}]+", ""),
    (rf"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # times at the end
    (r"\\n", " "),  # line breaks that were written out
    (r"#\d{1,3}\b", ""),  # numbers of articles
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILE_ENDINGS})", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    ("[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~"
     r")(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)  # fmt: skip
_JOINT = re.compile(r"[-_]")
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_ENDINGS})(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # 10x20; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_ENDS = _rules(
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def prepare_caption(caption: str, *, clean: bool) -> str:
    """What the tokenizer gets of a caption.

    Args:
        clean: clean it twice, as every generation does; otherwise lower case without white space
            at the ends (the originals' `use_text_preprocessing=False`).

    Raises:
        KinemaError: cleaning needs packages that are not installed.
    """
    if clean:
        return clean_caption(clean_caption(caption))
    return caption.lower().strip()


def clean_caption(caption: str) -> str:
    """One pass of the rules (the originals' `T5Embedder.clean_caption`).

    Raises:
        KinemaError: ftfy or beautifulsoup4 is not installed.
    """
    ftfy, soup = _libraries()
    text = unquote_plus(caption).strip().lower()
    text = _apply(_ADDRESSES, text)
    with warnings.catch_warnings():
        # "looks like a file name": captions may.
        warnings.simplefilter("ignore")
        text = soup(text, features="html.parser").text
    text = _apply(_CHARACTERS, text)
    if len(_JOINT.findall(text)) > _MAX_DASHES:
        text = _JOINT.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_ENDS, _apply(_WORDS, text)).strip()


def _apply(rules: tuple[_Rule, ...], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _libraries() -> tuple[Any, Any]:
    # Not needed by anyone who trains without released text encoders.
    try:
        import ftfy
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise KinemaError(
            f"caption cleaning needs {error.name}, which is not installed",
            where="text.clean_caption",
            hint="pip install 'kinema[pretrained]'",
        ) from None
    return ftfy, BeautifulSoup
