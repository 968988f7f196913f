"""What can be wrong with a media file: a code for programs, a sentence for people."""

from __future__ import annotations

import os
from pathlib import Path

from kinema.config.errors import KinemaError

REASONS: dict[str, tuple[str, str | None]] = {
    "missing": (
        "there is no such file",
        "check the path (those in a manifest count from its folder, or from --data-root)",
    ),
    "unreadable": ("the file may not be read", "check its permissions"),
    "not_a_file": ("this is not a regular file", "give a video or an image file"),
    "empty": ("the file is empty (0 bytes)", "copy or download it again"),
    "not_media": ("the content is no known video or image format", None),
    "no_video_stream": ("the file has no video, only other streams", None),
    "no_frames": ("the file has a video stream without any frame", None),
    "zero_duration": ("every frame is shown for 0 seconds, so nothing is shown", None),
    "truncated": ("the file is cut off", "copy or download it again"),
    "corrupt": ("the data is damaged", "copy or download it again"),
    "unsupported": ("this FFmpeg has no decoder for the format", "convert it to H.264 mp4"),
    "too_short": ("the file has fewer frames than asked for", "index the folder again"),
    "timeout": (
        "reading took longer than the time limit",
        "raise the limit if the file or its disk is merely slow",
    ),
    "crashed": ("the process that read the file died", "convert the file again or leave it out"),
}
"""Reason code -> (what is wrong, what to do)."""
PASSING = frozenset({"missing", "unreadable"})
"""Reasons that are not the file's own: a disk or a store that does not answer, a permission."""


class MediaError(KinemaError):
    """A file that cannot be used.

    Args:
        reason: a key of `REASONS`.
        path: the file.
        detail: what exactly was seen.
    """

    def __init__(self, reason: str, path: str | os.PathLike[str], detail: str = "") -> None:
        sentence, hint = REASONS[reason]
        what = f"{sentence} ({detail})" if detail else sentence
        super().__init__(what, where=str(path), hint=hint)
        self.reason = reason
        self.path = path if isinstance(path, str) else Path(path)
        self.detail = detail

    def __reduce__(self) -> tuple[object, ...]:
        return (MediaError, (self.reason, self.path, self.detail))
