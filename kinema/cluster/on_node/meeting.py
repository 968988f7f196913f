"""Whether nodes can reach the first one, where all processes meet before they train.

On the first node `main` listens on a port until its stdin ends; on the others it connects there.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from typing import Any


def main(address: str | None = None, port: int = 0, wait_s: float = 5.0) -> dict[str, Any] | None:
    """Listen (without an address), or connect.

    Args:
        port: 0: a free one.

    Returns:
        When connecting: `local` (this node's address on that way) and `remote`, or `error`.
        When listening, one line is written instead: `port`, or `error`.
    """
    if address is not None:
        return _connect(address, port, wait_s)
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        _say({"error": f"port {port}: {error.strerror}"})
        return None
    _say({"port": server.getsockname()[1]})
    threading.Thread(target=_accept, args=(server,), daemon=True).start()
    sys.stdin.buffer.read()
    return None


def _say(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _connect(address: str, port: int, wait_s: float) -> dict[str, Any]:
    try:
        with socket.create_connection((address, port), wait_s) as line:
            return {"local": line.getsockname()[0], "remote": line.getpeername()[0]}
    except OSError as error:
        return {"error": error.strerror or str(error)}


def _accept(server: socket.socket) -> None:
    while True:
        server.accept()[0].close()
