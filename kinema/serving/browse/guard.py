"""Who may ask: the page is for the person who started it, not for other sites in the browser.

Another site can make a browser send requests here. It cannot read the answers, but it could write;
and by rebinding its own name to 127.0.0.1 it could read. So requests must be addressed to this
machine by a loopback name, and what changes something must be JSON from this very page. Where the
page is served beyond loopback, a secret token takes the place of the name.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOOPBACK = {"127.0.0.1", "localhost", "::1"}
COOKIE = "kinema-browse"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware that refuses what `refusal` refuses, and adds `HEADERS`."""

    def __init__(self, app: Callable[..., Awaitable[None]], token: str | None) -> None:
        """Args:
        token: needed in `?token=` once, then in a cookie; None: loopback names only.
        """
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        asked = query.get("token", [""])[0]
        why = refusal(scope["method"], headers, self._token, asked)

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                if self._token and _same(asked, self._token):
                    cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                    added.append((b"set-cookie", cookie.encode()))
                message["headers"] = [*message["headers"], *added]
            await send(message)

        if why is None:
            await self._app(scope, receive, guarded)
            return
        body = json.dumps({"what": why, "hint": None}).encode()
        kind = [(b"content-type", b"application/json")]
        await guarded({"type": "http.response.start", "status": 403, "headers": kind})
        await guarded({"type": "http.response.body", "body": body})


def refusal(method: str, headers: dict[str, str], token: str | None, asked: str) -> str | None:
    """Why a request is refused, or None.

    Args:
        headers: names in small letters.
        token: the secret, where there is one.
        asked: what the request gave as `?token=`.
    """
    host = headers.get("host", "")
    if token is None:
        if _name(host) not in LOOPBACK:
            return "this page answers to 127.0.0.1 and localhost only"
    elif not _same(asked, token) and not _same(_cookie(headers.get("cookie", "")), token):
        return "the address needs the token that `kinema data browse` printed"
    site = headers.get("sec-fetch-site", "none")
    navigation = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if site not in ("same-origin", "none") and not navigation:
        return "another site may not ask"
    if method in ("GET", "HEAD"):
        return None
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        return "changes are sent as application/json"
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return "changes come from this page only"
    return None


def _name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _cookie(text: str) -> str:
    try:
        found = SimpleCookie(text).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())
