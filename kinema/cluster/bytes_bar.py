"""How far a copy is; nothing is shown for what is done at once."""

from __future__ import annotations

from io import StringIO

from kinema.telemetry.progress import Progress

MEGA = 10**6
"""Bytes that count as one on the bar."""


def bytes_bar(what: str, total: int) -> Progress:
    """A bar over `total` bytes; advance it by megabytes."""
    silent = StringIO() if total < 10 * MEGA else None
    return Progress(what, total=total // MEGA, unit="megabyte", stream=silent)
