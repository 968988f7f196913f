"""Which process may read the stacks of this one, where Linux lets only parents trace (Yama)."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

TRACER = "KINEMA_TRACER"
"""Environment variable with the process id; decode workers inherit it."""
_PR_SET_PTRACER = 0x59616D61


def allow_tracer() -> None:
    """Let the process that `KINEMA_TRACER` names, and its children, trace this one.

    Without effect where Linux has no Yama, or another system runs.
    """
    with suppress(KeyError, ValueError, OSError, AttributeError):
        pid = int(os.environ[TRACER])
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)
