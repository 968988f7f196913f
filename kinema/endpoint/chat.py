"""A language model behind an OpenAI-compatible endpoint: one question, one answer.

The key is read from the environment, travels in the request's header and appears nowhere else: not
in a message, not in a log, not at an address that a redirect names. It does not leave this machine
without encryption. No errors of `urllib` come out, and no address: both may hold secrets.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from kinema.config.errors import KinemaError

MAX_ANSWER_BYTES = 1 << 20
LONGEST_WAIT_S = 60.0
"""No endpoint is waited for longer than this before it is asked again, whatever it says."""
SHORTEST_SECRET = 8
"""Characters of a key that must not be quoted, not even in part."""
_AGAIN = (408, 409, 425, 429)
"""Answers below 500 after which the same request may succeed later."""
_ABOUT_KEYS = (401, 403, 407)
"""Answers whose text may quote the key."""
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"^```\w*\s|\s*```$")
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u00ab": "\u00bb"}


class NoAnswerError(Exception):
    """Why there is no answer, in words for the person."""

    def __init__(self, why: str, *, code: int | None = None) -> None:
        super().__init__(why)
        self.code = code
        """The status, where the endpoint gave one."""


class PassingError(NoAnswerError):
    """The same request may succeed later."""

    def __init__(self, why: str, *, code: int | None = None, wait_s: float = 0.0) -> None:
        super().__init__(why, code=code)
        self.wait_s = wait_s
        """Seconds that the endpoint asked to be left alone for."""


class RefusedError(NoAnswerError):
    """The endpoint does not answer this request, however often it is asked."""


class UnusableError(NoAnswerError):
    """It answered, and not as an endpoint of this kind answers."""


@dataclass(frozen=True)
class Completion:
    """An answer."""

    text: str
    finish: str
    """Why it ends: `stop`, `length` (cut off), `content_filter`, ...; empty where nothing is
    said."""
    tokens_in: int | None
    """As the endpoint counts them; None where it does not."""
    tokens_out: int | None


@dataclass(frozen=True)
class ChatEndpoint:
    """Where questions go, and with which key."""

    url: str
    key: str = field(repr=False)
    timeout_s: float
    """For one answer from beginning to end, in seconds."""

    def ask(self, body: Mapping[str, Any]) -> Completion:
        """Ask once.

        Args:
            body: of the request, as the chat completions API defines it.

        Raises:
            PassingError, RefusedError, UnusableError: there is no answer.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        deadline = time.monotonic() + self.timeout_s
        opener = urllib.request.build_opener(_NoRedirects)
        try:
            with opener.open(request, timeout=self.timeout_s) as response:
                content = _read(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._failure(error) from None
        except TimeoutError:
            raise PassingError(f"no answer within {self.timeout_s:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise PassingError(f"no answer within {self.timeout_s:g} s") from None
            reason = getattr(error.reason, "strerror", None) or type(error.reason).__name__
            raise PassingError(f"the endpoint cannot be reached: {reason}") from None
        except (HTTPException, OSError) as error:
            raise PassingError(f"the connection broke: {type(error).__name__}") from None
        return _completion(content)

    def _failure(self, error: urllib.error.HTTPError) -> NoAnswerError:
        with error:
            code = error.code
            what = f"the endpoint answered {code} {_phrase(code)}".rstrip()
            wait_s = _retry_after(error.headers.get("Retry-After"))
            if code not in _ABOUT_KEYS:
                what += self._quoted(error)
        if code >= 500 or code in _AGAIN:
            return PassingError(what, code=code, wait_s=wait_s)
        return RefusedError(what, code=code)

    def _quoted(self, error: urllib.error.HTTPError) -> str:
        """What the endpoint says is wrong, where it says it as OpenAI does and without the key."""
        try:
            found = json.loads(error.read(1 << 16))["error"]
            said = found["message"] if isinstance(found, dict) else found
        except (ValueError, LookupError, TypeError, OSError, HTTPException):
            return ""
        if not isinstance(said, str) or not said.strip() or self._tells_of_key(said):
            return ""
        line = "".join(c if c.isprintable() else " " for c in said)
        line = " ".join(line.split())
        return f" ({line if len(line) <= 200 else line[:197] + '...'})"

    def _tells_of_key(self, text: str) -> bool:
        size = min(SHORTEST_SECRET, len(self.key))
        pieces = {self.key[i : i + size] for i in range(len(self.key) - size + 1)} if size else ()
        return any(piece in text for piece in pieces)


def check_address(endpoint: str) -> None:
    """
    Raises:
        ValueError: not an address that questions may go to.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"endpoint is {endpoint!r}; it must be an http or https address, such as "
            "http://localhost:8000/v1"
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "endpoint holds a user name or password; put the key into an environment variable "
            "and name that in api_key_env"
        )


def chat_url(endpoint: str) -> str:
    """Where requests go: `/chat/completions` below the address of the API."""
    parts = urlsplit(endpoint)
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urlunsplit(parts._replace(path=path, fragment=""))


def read_key(variable: str, endpoint: str, *, where: str, hint: str) -> str:
    """The key that an environment variable holds; empty where it is not set.

    Args:
        where, hint: of the error: what was set, and how to send no key at all.

    Raises:
        KinemaError: it would travel to another machine in clear.
    """
    key = os.environ.get(variable, "").strip()
    parts = urlsplit(endpoint)
    if key and parts.scheme == "http" and not _is_this_machine(parts.hostname or ""):
        raise KinemaError(
            f"the key in {variable} would be sent to {parts.hostname} without encryption",
            where=where,
            hint=hint,
        )
    return key


def unwrapped(text: str) -> str:
    """An answer without what models put around it: thoughts, a code fence, quotation marks."""
    text = _THOUGHTS.sub("", text).strip()
    text = _FENCE.sub("", _FENCE.sub("", text)).strip()
    ends, inner = text[:1] + text[-1:], text[1:-1]
    if inner and _QUOTES.get(ends[0]) == ends[1] and not any(mark in inner for mark in ends):
        text = inner.strip()
    return text


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another place."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """Everything, but not for longer than the time limit: the socket's own limit is per piece."""
    body = bytearray()
    while piece := response.read1(65536):
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise UnusableError("the answer is longer than any caption")
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)


def _completion(body: bytes) -> Completion:
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        text = choice["message"]["content"]
        finish, usage = choice.get("finish_reason"), found.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UnusableError("the answer is no chat completion in JSON") from None
    if isinstance(text, list):  # some endpoints answer in parts, as they are asked
        parts = [p.get("text") for p in text if isinstance(p, dict)]
        text = "".join(p for p in parts if isinstance(p, str)) if parts else None
    if not isinstance(text, str):
        raise UnusableError("the answer holds no text")
    usage = usage if isinstance(usage, dict) else {}
    return Completion(
        text,
        finish if isinstance(finish, str) else "",
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 40 else None


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
