"""Ctrl-C and SIGTERM: finish the step, save, leave."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop, and by what."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request; a second SIGINT interrupts at once.

    Under torchrun one Ctrl-C arrives twice (from the terminal and from torchrun), so that there
    repeats are ignored; torchrun itself kills what does not end within its own limit.
    """
    request = StopRequest()
    launched = "TORCHELASTIC_RUN_ID" in os.environ

    def handle(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if request and not launched and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not request:
            request.signal = name
            # write(2) itself: print may be interrupted in the middle of its own buffer.
            text = f"{name}: finishing this step, then saving (Ctrl-C again to leave at once)\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
