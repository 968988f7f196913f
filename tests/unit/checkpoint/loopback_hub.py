"""A model hub on this machine: the routes that huggingface_hub uses to look up and download."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


class Hub:
    """What the hub holds, and what was asked of it.

    Attributes:
        files: content by repository and path.
        older: the same at the revision `v1`.
        gated, private: repositories that answer 403 and 401.
        cut: bytes after which a download breaks off, once for each entry.
        requests: method and path of every request.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.older: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.cut: list[int] = []
        self.broken = False
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlparse(request.path).path).strip("/")
        self.requests.append(f"{request.command} {path}")
        if self.broken:
            return self._error(request, 500, "")
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            return self._listing(request, "/".join(parts[2:4]))
        if len(parts) < 5 or parts[2] != "resolve":
            return self._error(request, 404, "")
        repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        if repo in self.gated:
            return self._error(request, 403, "GatedRepo")
        if repo in self.private:
            return self._error(request, 401, "RepoNotFound")
        if repo not in self.files:
            return self._error(request, 404, "RepoNotFound")
        held = {"main": self.files, COMMIT: self.files, "v1": self.older, OLDER: self.older}
        if revision not in held:
            return self._error(request, 404, "RevisionNotFound")
        content = held[revision].get(repo, {}).get(name)
        commit = COMMIT if held[revision] is self.files else OLDER
        if content is None:
            return self._error(request, 404, "EntryNotFound", commit)
        self._file(request, content, commit, body)

    def _file(
        self, request: BaseHTTPRequestHandler, content: bytes, commit: str, body: bool
    ) -> None:
        start = 0
        wanted = request.headers.get("Range")
        if wanted:
            self.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        rest = content[start:]
        request.send_response(206 if wanted else 200)
        request.send_header("X-Repo-Commit", commit)
        request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        request.send_header("Content-Length", str(len(rest)))
        request.send_header("Accept-Ranges", "bytes")
        if wanted:
            last = len(content) - 1
            request.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        request.end_headers()
        if not body:
            return
        if self.cut:
            request.wfile.write(rest[: self.cut.pop()])
            request.wfile.flush()
            request.close_connection = True
            request.connection.close()
            return
        request.wfile.write(rest)

    def _listing(self, request: BaseHTTPRequestHandler, repo: str) -> None:
        if repo not in self.files:
            return self._error(request, 404, "RepoNotFound")
        content = self.files[repo]
        if "/tree/" in request.path:
            answer: Any = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in content.items()
            ]
        else:
            answer = {
                "id": repo,
                "sha": COMMIT,
                "siblings": [{"rfilename": n} for n in content],
                "private": False,
                "tags": [],
            }
        data = json.dumps(answer).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _error(
        self, request: BaseHTTPRequestHandler, status: int, code: str, commit: str | None = None
    ) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
            request.send_header("X-Error-Message", code)
        if commit:
            request.send_header("X-Repo-Commit", commit)
        request.send_header("Content-Length", "0")
        request.end_headers()
