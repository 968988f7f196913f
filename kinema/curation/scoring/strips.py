"""The frames of rows, from their strips; a strip that cannot be read costs its own row only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kinema.curation.config import FramesConfig
from kinema.curation.stage import Bad, Part, Places, Result, Row
from kinema.media.errors import MediaError

Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""RGB `[H, W, 3]`."""
BASE_S, FRAME_S = 30.0, 30.0
"""What a clip and each of its frames may take: SigLIP's largest model needs ten seconds for a frame
on one core, and the core may be a slow or a shared one."""


def frame_settings(frames: FramesConfig) -> dict[str, Any]:
    """For `Part.made_by`: other frames, other scores."""
    return asdict(frames)


def read_frames(row: Row, places: Places) -> list[Picture] | Bad:
    """The frames of a clip's strip, in order of time."""
    from kinema.curation.frames import read_strip

    name, count = row.get("frames"), row.get("frames_count")
    if not name or not count:
        return Bad("no_frames", "the clip has no strip of frames")
    path = f"{places.frames}/{name}"
    try:
        pictures = read_strip(path, int(count))
    except MediaError as error:
        # A store that does not answer may do so next time.
        passing = error.reason == "unreadable"
        return Bad(error.reason, f"the strip of frames {name}: {error.what}", passing)
    return list(pictures)


def in_order(
    rows: Sequence[Row], found: Mapping[int, Result], bad: Mapping[int, Bad], parts: Sequence[Part]
) -> list[Result]:
    """Results in the order of the rows; of a row without frames, `Bad` for all it asks for."""
    return [
        found[i] if i in found else dict.fromkeys(asked(row, parts), bad[i])
        for i, row in enumerate(rows)
    ]


def asked(row: Row, parts: Sequence[Part]) -> list[str]:
    """Names of the parts that a row wants; all where it does not say."""
    todo = row.get("todo")
    return [part.name for part in parts if todo is None or part.name in todo]


def time_limit_s(row: Row) -> float:
    """See `Stage.time_limit_s`."""
    return BASE_S + FRAME_S * int(row.get("frames_count") or 1)
