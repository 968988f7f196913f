"""What a media file is, found out without decoding all of it."""

from __future__ import annotations

import os

from kinema.media.info import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaInfo

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "MediaInfo", "probe"]


def probe(path: str | os.PathLike[str]) -> MediaInfo:
    """Facts about a video or image file; its first picture is decoded to be sure of them.

    Raises:
        MediaError: the file cannot be used; `reason` says why.
    """
    raise NotImplementedError
