"""Serving the page until Ctrl-C."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

import uvicorn

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest
from kinema.data.tables import ENDINGS
from kinema.media.stores import is_url, suffix
from kinema.serving.browse.app import make_app
from kinema.serving.browse.edits import Edits
from kinema.serving.browse.guard import LOOPBACK
from kinema.serving.browse.posters import Posters

PORT = 8765
TRIED = 20
"""Ports after the first that are tried where none was asked for."""


def browse(
    path: str,
    *,
    data_root: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_page: bool = False,
    say: Callable[[str], None],
) -> None:
    """Serve the page of a manifest; returns after Ctrl-C.

    Args:
        path: a manifest, or the folder of a curation run.
        data_root: the folder that relative paths are below.
        host: address to bind; beyond loopback, the page's address has a secret token.
        port: None takes the first free one from `PORT` on.
        open_page: open it in the browser of this machine.
        say: prints a line for the person.

    Raises:
        KinemaError: no such manifest; the port is taken.
    """
    if not is_url(path) and not os.path.exists(path):
        raise KinemaError(
            "does not exist", where=path, hint="give a manifest, or the folder of a curation run"
        )
    if (suffix(path) not in ENDINGS) if is_url(path) else os.path.isdir(path):
        path = f"{path.rstrip('/')}/manifest.parquet"
    manifest = Manifest.read(path, data_root=data_root)
    edits = Edits(edits_file(path), manifest.path, len(manifest))
    with bind(host, port) as listener:
        token = None if host in LOOPBACK else secrets.token_urlsafe(16)
        posters = Posters(manifest, workers=max(1, (os.cpu_count() or 2) // 2))
        threading.Thread(target=posters.tidy, daemon=True).start()
        config = uvicorn.Config(
            make_app(manifest, edits, posters, token=token),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=2,
        )
        shown = host if host not in ("0.0.0.0", "::") else socket.gethostname()
        bound = listener.getsockname()[1]
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{bound}/"
        if token:
            address += f"?token={token}"
            say(
                f"warning: served on {host}: whoever has this address sees the clips and can edit "
                "captions; it is not encrypted (safer: ssh -L "
                f"{bound}:127.0.0.1:{bound} and the default host)"
            )
        if edits.lost:
            say(f"{edits.file}: {edits.lost} changes are of clips that the manifest has no more")
        say(f"{path}: {len(manifest)} clips, {int(manifest.kept.sum())} kept")
        say(f"{address}  (Ctrl-C ends it)")
        if open_page:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            pass
        finally:
            posters.close()


def edits_file(manifest: str) -> Path:
    """`MANIFEST.edits.jsonl`; of a manifest in a store, in the folder one is in."""
    name = (
        manifest.rstrip("/").rsplit("/", 1)[-1] if is_url(manifest) else os.path.abspath(manifest)
    )
    return Path(f"{name}.edits.jsonl")


def bind(host: str, port: int | None) -> socket.socket:
    """A listening socket.

    Raises:
        KinemaError: the port is taken or may not be used; no such address here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = (PORT if port is None else port) + (TRIED if port is None else 0)
    for wanted in range(PORT if port is None else port, last + 1):
        # The protocol is named, because asyncio switches Nagle's algorithm off only where it is
        # (otherwise each answer waits 40 ms for an acknowledgement).
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, wanted))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE and wanted < last:
                continue
            taken = error.errno == errno.EADDRINUSE
            raise KinemaError(
                f"port {wanted} is taken" if taken else f"cannot be bound: {error.strerror}",
                where=f"{host}:{wanted}",
                hint="another --port; without it, a free one is found" if taken else "--host",
            ) from None
    raise AssertionError
