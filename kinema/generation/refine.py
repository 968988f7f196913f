"""Prompts made richer by a language model, through any OpenAI-compatible endpoint.

Off unless it is asked for. Whatever goes wrong with the endpoint, the prompt stays as it was, and
a warning says why. The key is read from the environment, travels in the request's header and
appears nowhere else; it does not leave this machine without encryption.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from kinema.config.errors import KinemaError
from kinema.config.settings import settings
from kinema.generation.prompts import join_segments, split_segments

TEMPLATE = """\
You prepare prompts for a model that makes short videos from text. Rewrite what the user sends \
into one caption of such a video, as someone would describe it who has just watched it.

Keep every subject, number, colour, place, action and style that is mentioned, and keep quoted \
words as they are. Where something is left open, decide on it: how the subjects look, where they \
are, what moves and which way, the light, and how the camera is held. Describe one continuous \
shot, in the present tense, in at most 100 words of plain English, without line breaks. Do not \
mention sound, do not address anyone, and do not add titles, lists or remarks.

Answer with the caption alone.
"""
MAX_ANSWER_BYTES = 1 << 20
LONGEST_WAIT_S = 60.0
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"^```\w*\s|\s*```$")
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u00ab": "\u00bb"}
_AGAIN = (408, 409, 425, 429)
"""Answers below 500 after which the same request may succeed later."""

log = logging.getLogger(__name__)


@settings
class RefineConfig:
    """Which language model refines prompts, and how long it may take."""

    endpoint: str
    """Address of the API: `http://localhost:8000/v1`; `/chat/completions` is added to it."""
    model: str
    """The language model's name, as the endpoint knows it."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; where it is not set, none is sent."""
    timeout_s: float = 60.0
    """For one answer, in seconds."""
    retries: int = 2
    """How often a request is repeated that failed for a reason that may pass."""
    backoff_s: float = 1.0
    """Seconds before the first repetition; each further one waits twice as long."""
    max_chars: int = 1500
    """Longer answers are not used."""
    template: str = TEMPLATE
    """What the language model is told to do with the prompt that follows."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"endpoint is {self.endpoint!r}; it must be an http or https address, such as "
                "http://localhost:8000/v1"
            )
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "endpoint holds a user name or password; put the key into an environment variable "
                "and name that in api_key_env"
            )
        if not self.model:
            raise ValueError("model is empty; name one that the endpoint has")
        for name in ("timeout_s", "max_chars"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("retries", "backoff_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")

    @property
    def url(self) -> str:
        """Where requests go."""
        parts = urlsplit(self.endpoint)
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions"
        return urlunsplit(parts._replace(path=path, fragment=""))

    def key(self) -> str:
        """The key; empty where none is set.

        Raises:
            KinemaError: it would travel to another machine in clear.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        parts = urlsplit(self.endpoint)
        if key and parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
            raise KinemaError(
                f"the key in {self.api_key_env} would be sent to {parts.hostname} without "
                "encryption",
                where="--refine",
                hint="an https address; or, if it needs no key, --refine-key-env NONE",
            )
        return key


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class RefinedPrompt:
    """A prompt before and after."""

    original: str
    """As the person wrote it."""
    text: str
    """The prompt to use; the original one where it could not be refined."""
    note: str | None = None
    """Why it could not, for the person; None: it was."""


class _NotRefinedError(Exception):
    """Why there is no refined prompt, in words for the person."""

    def __init__(self, why: str, *, lasting: bool = False) -> None:
        super().__init__(why)
        self.lasting = lasting
        """The endpoint fails, whatever the prompt."""


def refine(
    prompts: Sequence[str],
    config: RefineConfig,
    *,
    on_done: Callable[[], None] | None = None,
) -> list[RefinedPrompt]:
    """Refine prompts one after the other; texts of segments (`|0| a |2| b`) each by itself.

    A prompt that cannot be refined stays, with a note and a logged warning. After an endpoint did
    not answer at all it is not asked for the rest.

    Args:
        prompts: without JSON at their ends (`prompts.split_json` takes it off).
        on_done: called after each prompt.

    Raises:
        KinemaError: a prompt whose segments cannot be read, or a key that would be sent in clear.
    """
    key = config.key()
    opener = urllib.request.build_opener(_NoRedirects)
    done: list[RefinedPrompt] = []
    given_up: str | None = None
    for prompt in prompts:
        try:
            if given_up is not None:
                raise _NotRefinedError(given_up, lasting=True)
            texts, starts = split_segments(prompt)
            refined = join_segments([_refine_text(opener, t, config, key) for t in texts], starts)
            done.append(RefinedPrompt(prompt, refined))
        except _NotRefinedError as failure:
            if given_up is None:
                log.warning("prompt not refined: %s", failure)
            if failure.lasting:
                given_up = str(failure)
            done.append(RefinedPrompt(prompt, prompt, note=str(failure)))
        if on_done:
            on_done()
    return done


def _refine_text(
    opener: urllib.request.OpenerDirector, text: str, config: RefineConfig, key: str
) -> str:
    body = {
        "model": config.model,
        "messages": [
            {"role": "system", "content": config.template},
            {"role": "user", "content": text},
        ],
    }
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    wait = config.backoff_s
    for attempt in range(config.retries + 1):
        request = urllib.request.Request(config.url, json.dumps(body).encode(), headers)
        try:
            return _caption(_ask(opener, request, config.timeout_s), config, key)
        except _PassingError as reason:
            if attempt == config.retries:
                times = f" (asked {attempt + 1} times)" if attempt else ""
                raise _NotRefinedError(f"{reason}{times}", lasting=True) from None
            time.sleep(min(max(wait, reason.wait_s), LONGEST_WAIT_S))
            wait *= 2
    raise AssertionError("the loop returns or raises")


class _PassingError(Exception):
    """A failure after which it is worth asking again."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another place."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _ask(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout_s: float
) -> bytes:
    """The answer's body.

    Messages name no address, header or text of the server's: any of them may hold the key.
    """
    deadline = time.monotonic() + timeout_s
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return _read(response, deadline)
    except urllib.error.HTTPError as error:
        with error:
            what = f"the endpoint answered {error.code} {_phrase(error.code)}".rstrip()
            wait_s = _retry_after(error.headers.get("Retry-After"))
        if error.code >= 500 or error.code in _AGAIN:
            raise _PassingError(what, wait_s) from None
        raise _NotRefinedError(what, lasting=True) from None
    except TimeoutError:
        raise _PassingError(f"no answer within {timeout_s:g} s") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _PassingError(f"no answer within {timeout_s:g} s") from None
        reason = getattr(error.reason, "strerror", None) or type(error.reason).__name__
        raise _PassingError(f"the endpoint cannot be reached: {reason}") from None
    except (HTTPException, OSError) as error:
        raise _PassingError(f"the connection broke: {type(error).__name__}") from None


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """Everything, but not for longer than the time limit: the socket's own limit is per piece."""
    body = bytearray()
    while piece := response.read1(65536):
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise _NotRefinedError("the answer is longer than any caption")
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)


def _caption(body: bytes, config: RefineConfig, key: str) -> str:
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _NotRefinedError("the answer is no chat completion in JSON") from None
    if not isinstance(text, str):
        raise _NotRefinedError("the answer holds no text")
    text = _THOUGHTS.sub("", text).strip()
    text = _FENCE.sub("", _FENCE.sub("", text))
    # One line; bars would start segments.
    text = " ".join(text.replace("|", " ").split())
    ends, inner = text[:1] + text[-1:], text[1:-1]
    if inner and _QUOTES.get(ends[0]) == ends[1] and not any(mark in inner for mark in ends):
        text = inner.strip()
    if not any(c.isalpha() for c in text):
        raise _NotRefinedError("the answer is empty")
    if len(text) > config.max_chars:
        raise _NotRefinedError(
            f"the answer has {len(text)} characters, more than {config.max_chars} (max_chars)"
        )
    if key and key in text:
        raise _NotRefinedError("the answer repeats the key")
    return text


def _phrase(code: int) -> str:
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return ""


def _retry_after(text: str | None) -> float:
    """Seconds; dates and nonsense count as none."""
    try:
        seconds = float(text or "")
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
