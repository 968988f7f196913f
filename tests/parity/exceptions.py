"""Defects of the originals that we do not copy: the one list of what parity leaves out, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    official: str
    """Pattern of the case's `official` name."""
    tensor: str
    """Pattern of the expected tensor's full name."""
    reason: str


@dataclass(frozen=True)
class Defects:
    entries: tuple[Defect, ...]

    def allows(self, official: str, tensor: str) -> bool:
        return any(
            re.search(d.official, official) and re.search(d.tensor, tensor) for d in self.entries
        )


DEFECTS_NOT_COPIED = Defects(entries=())
