"""The frames of rows, from their strips; a strip that cannot be read costs its own row only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kinema.config.errors import KinemaError
from kinema.curation.config import FramesConfig
from kinema.curation.cut import BORDERS
from kinema.curation.frames import Picture, read_strip
from kinema.curation.stage import Bad, Part, Places, Result, Row
from kinema.media.errors import MediaError

STRIP = ("height", "width", "start_frame", "end_frame", *BORDERS)
"""For `Part.depends`: what of a clip says which its pictures are (a copy may begin later than its
scene) and how they are cropped and scaled, beside `frame_settings`. A clip whose letterbox is cut
off has other scores than the whole picture."""
BASE_S, FRAME_S = 30.0, 30.0
"""What a clip and each of its frames may take: SigLIP's largest model needs ten seconds for a frame
on one core, and the core may be a slow or a shared one."""


def frame_settings(frames: FramesConfig) -> dict[str, Any]:
    """For `Part.made_by`: other frames, other scores."""
    return asdict(frames)


def read_frames(row: Row, places: Places) -> list[Picture] | Bad:
    """The frames of a clip's strip, in order of time.

    Why it cannot be read is not remembered: strips are written anew when they are gone.
    """
    name, count = row.get("frames"), row.get("frames_count")
    if not name or not count:
        return Bad("no_frames", "the clip has no strip of frames", passing=True)
    try:
        # The column counts from the run's folder, of which `places.frames` is a part.
        return read_strip(f"{places.frames}/{name.removeprefix('frames/')}", int(count))
    except KinemaError as error:
        reason = error.reason if isinstance(error, MediaError) else "bad_strip"
        return Bad(reason, f"{name}: {error.what}", passing=True)


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
