"""Clips with strips of frames, and an endpoint on this machine."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kinema.config.settings import from_dict
from kinema.curation.captions.stage import CaptionStage
from kinema.curation.config import CaptionConfig, FramesConfig
from kinema.curation.stage import Found, Places, Row
from tests.unit.curation.scoring.tiny_models import drawn, write_strip

KEY = "sk-test-0123456789abcdef"
Reply = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""
Says = Callable[["Question"], Reply]
SHAPES = [(40, 64), (64, 40), (40, 64), (30, 30), (48, 96)]


class Question:
    """One request."""

    def __init__(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.path, self.headers, self.body = path, headers, body
        self.at = time.monotonic()
        content = body["messages"][0]["content"]
        self.text = content if isinstance(content, str) else content[-1]["text"]

    @property
    def pictures(self) -> list[np.ndarray[Any, Any]]:
        """Decoded."""
        found = []
        for part in self.body["messages"][0]["content"][:-1]:
            assert part["type"] == "image_url"
            kind, data = part["image_url"]["url"].split(",", 1)
            assert kind == "data:image/jpeg;base64"
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                assert image.format == "JPEG"
                found.append(np.asarray(image))
        return found


class Server(ThreadingHTTPServer):
    """Answers with `says`, and remembers what it was asked."""

    daemon_threads = True
    request_queue_size = 64
    asked: list[Question]
    says: Says
    at_once = most_at_once = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def count(self, step: int) -> None:
        with self.lock:
            self.at_once += step
            self.most_at_once = max(self.most_at_once, self.at_once)

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.asked = []
        self.says = lambda question: saying(caption_of(question))
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.count(1)
        try:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            question = Question(self.path, dict(self.headers), json.loads(body))
            with self.server.lock:
                self.server.asked.append(question)
            status, headers, content = self.server.says(question)
        finally:
            self.server.count(-1)
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # who asked has given up

    def log_message(self, *_: Any) -> None:
        pass


def saying(text: Any, finish: str = "stop", usage: tuple[int, int] | None = (500, 20)) -> Reply:
    """A chat completion."""
    answer: dict[str, Any] = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]
    }
    if usage:
        answer["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def failing(status: int, headers: dict[str, str] | None = None, message: str = "") -> Reply:
    body = json.dumps({"error": {"message": message}}).encode() if message else b"no"
    return status, headers or {}, body


def caption_of(question: Question) -> str:
    """A caption that tells clips apart."""
    clip = question.text.split("clip ")[-1].split()[0] if "clip " in question.text else "?"
    return f"The video shows the dog number {clip} as it runs over green grass."


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places.below(str(tmp_path_factory.mktemp("run") / "out"))


@pytest.fixture
def clips(places: Places) -> list[Row]:
    """Five clips of different shapes; `text` and `duration` as a source's table may give them."""
    return [
        write_strip(places, f"c{i}", drawn(i, 3, shape)) | {"duration": 2.0 + i, "text": None}
        for i, shape in enumerate(SHAPES)
    ]


def settings(**given: Any) -> CaptionConfig:
    return from_dict(CaptionConfig, given)


def captions(config: CaptionConfig, rows: list[Row], places: Places) -> list[Found]:
    """What the stage gives for rows, all in one batch."""
    stage = CaptionStage(config, FramesConfig())
    return [result["caption"] for result in stage.open(places)(rows)]
