"""Small pictures in the report, from the strips of frames that curation keeps."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from kinema.config.errors import KinemaError
from kinema.curation.frames import read_strip
from kinema.media.stores import is_url, join

SIDE = 168
"""Pixels of the longer side."""
QUALITY = 68
BUDGET = 3_000_000
"""Bytes of all pictures of a page; past it, clips are shown without one."""


class Pictures:
    """Pictures of rows as `data:` addresses, within a budget of bytes."""

    def __init__(self, out: str, budget: int = BUDGET) -> None:
        """Args:
        out: the folder of the run, which `frames` is relative to.
        """
        self._out = out
        self._left = budget
        self._known: dict[str, str | None] = {}

    def of(self, row: Mapping[str, Any]) -> str | None:
        """The middle picture of a clip, or None where there is none.

        Args:
            row: with `frames` and `frames_count`, as the manifest has them.
        """
        name = row.get("frames")
        if not isinstance(name, str) or not name or name.startswith("/") or is_url(name):
            return None
        if ".." in name.split("/"):
            return None
        if name not in self._known:
            self._known[name] = self._make(name, row.get("frames_count"))
        return self._known[name]

    def _make(self, name: str, count: Any) -> str | None:
        try:
            frames = read_strip(str(join(self._out, name)), int(count or 1))
        except (KinemaError, ValueError, OSError):
            return None
        picture = Image.fromarray(frames[len(frames) // 2])
        picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=QUALITY, optimize=True)
        data = base64.b64encode(file.getvalue()).decode()
        if len(data) > self._left:
            return None
        self._left -= len(data)
        return f"data:image/jpeg;base64,{data}"
