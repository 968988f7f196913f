"""A decode worker: a small process (no torch) that does one call after another."""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pickle import PicklingError
from typing import Any

from kinema.config.errors import KinemaError
from kinema.media.channel import Channel
from kinema.media.errors import MediaError
from kinema.media.traced import allow_tracer

TRIM_EVERY = 100
"""Calls after which freed memory goes back to the system."""


def main(descriptor: int, parent: int) -> None:
    """Serve calls `(function, path, args)` from the socket until it closes.

    Args:
        descriptor: of the inherited socket.
        parent: process id of the pool; the worker ends with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the pool ends its workers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by the pool until here
    allow_tracer()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    channel = Channel(socket.socket(fileno=descriptor))
    # The imports that most calls need, before the time of the first call starts to run.
    importlib.import_module("kinema.media.clip")
    importlib.import_module("kinema.media.probe")
    with suppress(EOFError):
        channel.send("ready")
        for calls in itertools.count(1):
            if calls % TRIM_EVERY == 0:
                _trim()
            try:
                channel.send(_call(*channel.receive()))
            except (ImportError, AttributeError, TypeError, PicklingError) as error:
                # A function that cannot be imported here, or a result that cannot be sent.
                channel.send((False, error))


def _call(function: Any, path: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    """(True, result) or (False, exception)."""
    try:
        return True, function(path, *args)
    except KinemaError as error:
        return False, error
    except OSError as error:
        return False, MediaError("unreadable", path, error.strerror or str(error))
    except MemoryError:
        return False, MediaError("crashed", path, "out of memory")
    except Exception as error:
        # A mistake in our code: it goes to the caller, whose traceback lacks the worker's part.
        error.add_note(f"in a decode worker, at {path}")
        return False, error


def _trim() -> None:
    """Give freed pages back: decoders of many sizes leave glibc's heap in pieces that it keeps."""
    gc.collect()  # decoders in cycles
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
