"""Telling a file that was cut off from one that is damaged or no video at all.

FFmpeg reads what is left of a cut Matroska file without a word, and says of an mp4 without its
index only that the data is invalid.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"


def lacks_mp4_index(path: str | os.PathLike[str]) -> bool:
    """True if the file starts like an mp4 but has no `moov` box among its outermost boxes."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        boxes: list[bytes] = []
        while at + 8 <= end and len(boxes) < 1000:
            file.seek(at)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            if length == 1:  # the length follows in 64 bits
                length = int.from_bytes(header[8:16], "big")
            boxes.append(header[4:8])
            if length < 8:  # 0: up to the end of the file
                break
            at += length
    return bool(boxes) and boxes[0] == b"ftyp" and b"moov" not in boxes


def matroska_bytes_missing(path: str | os.PathLike[str]) -> int:
    """Bytes that the segment of a Matroska or WebM file says it has beyond the file's end, or 0."""
    with open(path, "rb") as file:
        if file.read(4) != _EBML:
            return 0
        header = _element_size(file)
        if header is None:
            return 0
        file.seek(header, os.SEEK_CUR)
        if file.read(4) != _SEGMENT:
            return 0
        segment = _element_size(file)
        if segment is None:  # a live recording: unknown on purpose
            return 0
        return max(0, file.tell() + segment - file.seek(0, os.SEEK_END))


def _element_size(file: BinaryIO) -> int | None:
    """An EBML size: the leading zeros of the first byte say how many bytes follow."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    extra = 8 - first[0].bit_length()
    bits = 7 * (extra + 1)
    value = int.from_bytes(first + file.read(extra), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value
