"""One question to an endpoint, one answer; refinement and captions test the rest."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from kinema.endpoint.chat import (
    ChatEndpoint,
    Completion,
    PassingError,
    RefusedError,
    UnusableError,
    chat_url,
    unwrapped,
)

KEY = "sk-0123456789abcdef"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = self.server.reply
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Server(HTTPServer):
    reply: tuple[int, bytes] = (200, b"")

    def ask(self, status: int, answer: object) -> Completion:
        self.reply = (status, json.dumps(answer).encode())
        url = f"http://127.0.0.1:{self.server_port}/v1/chat/completions"
        return ChatEndpoint(url, KEY, timeout_s=5.0).ask({"model": "m"})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(("127.0.0.1", 0), _Handler) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def answer(content: object, **more: object) -> dict[str, object]:
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}], **more}


@pytest.mark.parametrize(
    ("given", "completion"),
    [
        (answer("a"), Completion("a", "stop", None, None)),
        (answer("a", usage={"prompt_tokens": 3, "completion_tokens": 2}),
         Completion("a", "stop", 3, 2)),
        (answer("a", usage={"prompt_tokens": -3, "completion_tokens": True}),
         Completion("a", "stop", None, None)),
        (answer("a", usage=None), Completion("a", "stop", None, None)),
        (answer([{"type": "text", "text": "a "}, {"type": "x"}, {"type": "text", "text": "b"}]),
         Completion("a b", "stop", None, None)),
        ({"choices": [{"message": {"content": "a"}, "finish_reason": 5}]},
         Completion("a", "", None, None)),
    ],
)  # fmt: skip
def test_answers(server: Server, given: object, completion: Completion) -> None:
    assert server.ask(200, given) == completion


@pytest.mark.parametrize(
    "given", [None, [], {}, "text", {"choices": []}, {"choices": [None]}, answer(None), answer([]),
              answer(5), {"choices": {"0": 1}}],
)  # fmt: skip
def test_answers_that_are_none(server: Server, given: object) -> None:
    with pytest.raises(UnusableError):
        server.ask(200, given)


def test_what_is_wrong_is_quoted_but_no_part_of_the_key(server: Server) -> None:
    with pytest.raises(RefusedError) as caught:
        server.ask(400, {"error": {"message": "no such\nmodel\x1b[31m " + "x" * 400}})
    text = str(caught.value)
    assert text.startswith("the endpoint answered 400 Bad Request (no such model [31m xxx")
    assert text.endswith("x...)")
    assert len(text) < 260
    assert caught.value.code == 400
    with pytest.raises(PassingError, match=r"503 Service Unavailable \(busy\)$"):
        server.ask(503, {"error": "busy"})
    for said in (KEY, f"key {KEY[3:12]}***", {"message": f"... {KEY[-8:]}"}):
        with pytest.raises(RefusedError, match=r"404 Not Found$"):
            server.ask(404, {"error": said})
    with pytest.raises(RefusedError, match=r"401 Unauthorized$"):
        server.ask(401, {"error": {"message": "anything"}})
    for odd in ({"error": {"message": 5}}, {"error": None}, [], 7):
        with pytest.raises(RefusedError, match=r"422 [\w ]+$"):
            server.ask(422, odd)


def test_the_key_is_not_shown() -> None:
    assert KEY not in repr(ChatEndpoint("http://h", KEY, 1.0))


def test_addresses() -> None:
    assert chat_url("http://h:1/v1/") == "http://h:1/v1/chat/completions"
    assert chat_url("http://h/v1/chat/completions?a=1#x") == "http://h/v1/chat/completions?a=1"


def test_wrapping() -> None:
    assert unwrapped('<think>a</think>\n```json\n{"a": 1}\n```') == '{"a": 1}'
    assert unwrapped("\u201ca dog\u201d") == "a dog"
    assert unwrapped('"a" and "b"') == '"a" and "b"'
