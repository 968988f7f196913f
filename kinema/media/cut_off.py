"""Telling a file that was cut off from one that is damaged or no video at all.

FFmpeg reads what is left of a cut Matroska file without a word, and says of an mp4 without its
whole index that the data is invalid, or that there are no streams.
"""

from __future__ import annotations

import os
from typing import BinaryIO

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"


def cut_off(file: BinaryIO) -> str:
    """What is missing at the end of an mp4 or Matroska file, in words; "" if nothing seems to be.

    Frames of an mp4 that lie beyond its end are not looked for: that takes its index.

    Args:
        file: open for reading, at its start.
    """
    start = file.read(8)
    if start[4:] == b"ftyp":
        return _mp4_cut_off(file)
    if start[:4] == _EBML:
        return _matroska_cut_off(file)
    return ""


def _mp4_cut_off(file: BinaryIO) -> str:
    """Looks at the outermost boxes: `moov`, the index, must be there and whole."""
    end = file.seek(0, os.SEEK_END)
    at = 0
    for _ in range(1000):
        file.seek(at)
        header = file.read(16)
        if len(header) < 8:
            break
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:  # the length follows in 64 bits
            length = int.from_bytes(header[8:16], "big")
        if kind == b"moov":
            missing = at + length - end
            return f"{missing} bytes of its index are missing" if missing > 0 else ""
        if kind == b"meta":  # a still picture
            return ""
        if length < 8:  # 0: up to the end of the file
            break
        at += length
    return "its index, the moov box, is missing"


def _matroska_cut_off(file: BinaryIO) -> str:
    """Compares the size that the segment says it has with what is there."""
    file.seek(4)
    header = _element_size(file)
    if header is None:
        return ""
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return ""
    segment = _element_size(file)
    if segment is None:  # a live recording: unknown on purpose
        return ""
    expected, end = file.tell() + segment, file.seek(0, os.SEEK_END)
    return f"{expected - end} of {expected} bytes are missing" if expected > end else ""


def _element_size(file: BinaryIO) -> int | None:
    """An EBML size: the leading zeros of the first byte say how many bytes follow."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    extra = 8 - first[0].bit_length()
    bits = 7 * (extra + 1)
    value = int.from_bytes(first + file.read(extra), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value
