"""Messages between a decode pool and its workers: a pickled object, its arrays sent beside it.

Both ends are our own processes on a private socket; nothing read from a file is unpickled.
"""

from __future__ import annotations

import pickle
import socket
import struct
import time
from typing import Any

_LENGTH = struct.Struct("!Q")


class Channel:
    """One end of a socket.

    `send` and `receive` raise `EOFError` when the other end is gone, and `receive` raises
    `TimeoutError` when its time is up.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, message: Any) -> None:
        """Send an object; the bytes of its arrays go as they are, uncopied."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        parts = [memoryview(head), *(b.raw() for b in buffers)]
        try:
            self._socket.settimeout(None)
            self._socket.sendall(_LENGTH.pack(len(parts)))
            for part in parts:
                self._socket.sendall(_LENGTH.pack(part.nbytes))
                self._socket.sendall(part)
        except OSError as error:
            raise EOFError(str(error)) from None

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next object; its arrays lie in the memory that they were received into."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        count = self._length(deadline)
        head, *buffers = [self._bytes(self._length(deadline), deadline) for _ in range(count)]
        return pickle.loads(head, buffers=buffers)  # noqa: S301 (from our own process)

    def close(self) -> None:
        self._socket.close()

    def _length(self, deadline: float | None) -> int:
        return int(_LENGTH.unpack(self._bytes(_LENGTH.size, deadline))[0])

    def _bytes(self, length: int, deadline: float | None) -> bytearray:
        data = bytearray(length)
        left = memoryview(data)
        try:
            while left:
                if deadline is not None:
                    self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                received = self._socket.recv_into(left)
                if not received:
                    raise EOFError("the other end closed the channel")
                left = left[received:]
                if deadline is not None and left and time.monotonic() > deadline:
                    raise TimeoutError
        except ConnectionError as error:
            raise EOFError(str(error)) from None
        return data
