"""An S3 store on this machine, whose answers tests can turn into refusals."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

Refuse = Callable[[str, str], int]
"""Of a request's method and path (`/bucket/key`): a status to refuse it with, 0 to let it pass."""
CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


def let_pass(method: str, path: str) -> int:
    return 0


@dataclass
class S3Store:
    """moto's S3 behind a switch.

    Attributes:
        environment: what a process needs to use it.
        refuse: see `Refuse`; tests replace it.
        requests: (method, path, bytes asked for or sent back) of all that were let pass.
    """

    environment: dict[str, str]
    refuse: Refuse = let_pass
    requests: list[tuple[str, str, int]] = field(default_factory=list)

    def bucket(self, name: str) -> str:
        """A new bucket's URL."""
        import s3fs

        s3fs.S3FileSystem().mkdir(name)
        return f"s3://{name}"

    def names(self, url: str) -> set[str]:
        """All that is below a URL, as names relative to it."""
        import s3fs

        system = s3fs.S3FileSystem()
        system.invalidate_cache()
        base = url.removeprefix("s3://")
        return {name.removeprefix(f"{base}/") for name in system.find(base)}

    def fetched(self, part: str) -> int:
        """Bytes that were sent of objects whose path has `part` in it."""
        return sum(size for method, path, size in self.requests if method == "GET" and part in path)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Store]:
    """An S3 store that this process and those it starts find by their environment."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    from werkzeug.serving import WSGIRequestHandler, make_server

    store = S3Store({})
    moto = server_module.DomainDispatcherApplication(server_module.create_backend_app)

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    server = make_server(
        "127.0.0.1", 0, _switched(store, moto), threaded=True, request_handler=Quiet
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    store.environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        yield store
        s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()


def _switched(store: S3Store, app: Any) -> Any:
    def switched(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].encode("latin-1").decode()
        status = store.refuse(method, path)
        if status:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            answer = (
                f"<Error><Code>{CODES[status]}</Code><Message>{CODES[status]}</Message></Error>"
            )
            body = b"" if method == "HEAD" else answer.encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
            start(f"{status} {CODES[status]}", headers)
            return [body]
        body = b"".join(app(environ, start))
        store.requests.append((method, path, len(body)))
        return [body]

    return switched
