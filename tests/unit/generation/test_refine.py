"""Prompt refinement against a server on this machine: what goes out, what is taken, what is not."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import from_dict
from kinema.generation.refine import TEMPLATE, RefineConfig, RefinedPrompt, refine

KEY = "sk-test-0123456789"
Reply = tuple[int, dict[str, str], bytes] | Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if callable(reply):
            reply(self)
            return
        status, headers, content = reply
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    requests: list[tuple[str, dict[str, str], dict[str, Any]]]
    replies: list[Reply]

    def config(self, **more: Any) -> RefineConfig:
        address = f"http://127.0.0.1:{self.server_port}/v1"
        given = {"endpoint": address, "model": "m", "timeout_s": 5.0, "backoff_s": 0.01} | more
        return from_dict(RefineConfig, given)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server(("127.0.0.1", 0), Handler) as made:
        made.requests, made.replies = [], []
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def says(text: Any, status: int = 200) -> Reply:
    answer = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return status, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def test_a_prompt_goes_out_and_comes_back(server: Server) -> None:
    server.replies = [says("A grey cat\nsleeps on a sunny windowsill.")]
    config = server.config()
    calls: list[int] = []
    (found,) = refine(["a cat"], config, on_done=lambda: calls.append(1))
    assert found == RefinedPrompt("a cat", "A grey cat sleeps on a sunny windowsill.")
    assert calls == [1]
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "m"
    assert body["messages"] == [
        {"role": "system", "content": TEMPLATE},
        {"role": "user", "content": "a cat"},
    ]


def test_a_query_and_a_missing_key(server: Server) -> None:
    server.replies = [says("A grey cat.")]
    address = server.config().endpoint + "/?version=2"
    (found,) = refine(["a cat"], server.config(endpoint=address, api_key_env="MY_KEY"))
    assert found.text == "A grey cat."
    ((path, headers, _),) = server.requests
    assert path == "/v1/chat/completions?version=2"
    assert "Authorization" not in headers  # MY_KEY is not set


def test_segments_are_refined_each_by_itself(server: Server) -> None:
    server.replies = [says("By day | bright."), says("By night.")]
    (found,) = refine(["|0|day|2|night"], server.config(template="Do."))
    assert found.text == "|0|By day bright.|2|By night."
    assert [body["messages"] for _, _, body in server.requests] == [
        [{"role": "system", "content": "Do."}, {"role": "user", "content": text}]
        for text in ("day", "night")
    ]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('"A cat."', "A cat."),
        ("“A cat.”", "A cat."),
        ("```text\nA cat.\n```", "A cat."),
        ("<think>a dog?\nno</think>\n\nA cat.", "A cat."),
        ('"A" and "B"', '"A" and "B"'),
        ("A 'cat'", "A 'cat'"),
    ],
)
def test_wrapping_is_taken_off(server: Server, answer: str, text: str) -> None:
    server.replies = [says(answer)]
    assert refine(["a cat"], server.config())[0].text == text


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (says(""), "empty"),
        (says(" \n... "), "empty"),
        (says(None), "holds no text"),
        (says("word " * 400), "1999 characters, more than 1500"),
        (says(f"my key is {KEY}"), "repeats the key"),
        ((200, {}, b"<html>"), "no chat completion"),
        ((200, {}, b"[]"), "no chat completion"),
        ((200, {}, b'{"choices": []}'), "no chat completion"),
        ((200, {}, b" " * (2 << 20)), "longer than any caption"),
    ],
)
def test_nonsense_keeps_the_prompt(
    server: Server, caplog: pytest.LogCaptureFixture, reply: Reply, why: str
) -> None:
    server.replies = [reply, says("A dog.")]
    with caplog.at_level(logging.WARNING, "kinema.generation.refine"):
        cat, dog = refine(["a cat", "a dog"], server.config())
    assert cat.text == "a cat"
    assert why in str(cat.note)
    assert why in caplog.text
    assert dog.text == "A dog."  # the next prompt has its chance
    assert KEY not in caplog.text + str(cat.note)


def test_passing_failures_are_tried_again(server: Server) -> None:
    busy: Reply = (429, {"Retry-After": "0.2"}, b"")
    server.replies = [busy, (503, {"Retry-After": "soon"}, b""), says("A cat.")]
    start = time.monotonic()
    assert refine(["a cat"], server.config())[0].text == "A cat."
    assert time.monotonic() - start >= 0.2
    assert len(server.requests) == 3


def test_waits_grow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("kinema.generation.refine.time.sleep", waits.append)
    server.replies = [(500, {"Retry-After": "1e9"}, b""), (500, {}, b"")]
    (found,) = refine(["a cat"], server.config(retries=3, backoff_s=1.0))
    assert waits == [60.0, 2.0, 4.0]
    assert "500 Internal Server Error (asked 4 times)" in str(found.note)


def test_a_refusal_is_not_repeated_nor_are_others_asked(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.replies = [(401, {}, f"wrong key {KEY}".encode())]
    found = refine(["a cat", "a dog"], server.config())
    assert [f.text for f in found] == ["a cat", "a dog"]
    assert all("401 Unauthorized" in str(f.note) for f in found)
    assert len(server.requests) == 1
    assert len(caplog.records) == 1
    assert KEY not in caplog.text


def test_the_key_is_not_carried_elsewhere(server: Server) -> None:
    server.replies = [(307, {"Location": "/elsewhere"}, b""), says("A cat.")]
    (found,) = refine(["a cat"], server.config())
    assert found.text == "a cat"
    assert "307" in str(found.note)
    assert len(server.requests) == 1


def test_the_key_does_not_leave_the_machine_in_clear(server: Server) -> None:
    for host in ("llm.example.org", "192.168.1.5", "[fe80::1]"):
        with pytest.raises(
            KinemaError, match=r"without encryption(.|\n)*--refine-key-env"
        ) as caught:
            refine(["a cat"], server.config(endpoint=f"http://{host}:8000/v1"))
        assert KEY not in str(caught.value)
    assert server.requests == []
    for address in ("http://localhost:1/v1", "http://[::1]/v1", "https://llm.example.org/v1"):
        assert server.config(endpoint=address).key() == KEY
    config = server.config(endpoint="http://192.168.1.5/v1", api_key_env="NONE")
    assert config.key() == ""


@pytest.mark.parametrize("drips", [False, True])
def test_time_is_limited(server: Server, drips: bool) -> None:
    ended = threading.Event()

    def slow(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while drips and not ended.wait(0.05):
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                return
        ended.wait(60)

    server.replies = [slow]
    start = time.monotonic()
    (found,) = refine(["a cat"], server.config(timeout_s=0.3, retries=1))
    ended.set()
    assert time.monotonic() - start < 30
    assert found.text == "a cat"
    assert "no answer within 0.3 s (asked 2 times)" in str(found.note)


def test_nobody_there(server: Server) -> None:
    config = server.config(retries=0)
    server.shutdown()
    server.server_close()
    found = refine(["a cat", "a dog"], config)
    assert [f.text for f in found] == ["a cat", "a dog"]
    assert "cannot be reached: Connection refused" in str(found[0].note)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"endpoint": "localhost:8000/v1"}, "must be an http or https address"),
        ({"endpoint": "file:///etc/passwd"}, "must be an http or https address"),
        ({"endpoint": "https://me:secret@host/v1"}, "name that in api_key_env"),
        ({"model": ""}, "model is empty"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"retries": -1}, "retries is -1"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], message: str) -> None:
    good = {"endpoint": "https://api.example.org/v1/", "model": "m"}
    assert from_dict(RefineConfig, good).url == "https://api.example.org/v1/chat/completions"
    with pytest.raises(ConfigError, match=message):
        from_dict(RefineConfig, good | change)
