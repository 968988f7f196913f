"""The frames of a clip that models look at, as one JPEG strip per clip."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kinema.config.errors import KinemaError
from kinema.media.stores import Place, read_bytes

Picture = np.ndarray[Any, np.dtype[np.uint8]]


def frame_places(start: int, end: int, count: int) -> list[int]:
    """The middles of `count` equal parts of the frames `start` to `end` (exclusive), ascending;
    repeats where there are fewer frames."""
    return [start + int((end - start) * (i + 0.5) / count) for i in range(count)]


def strip_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """(height, width) of pictures in a strip: the longer side at most `max_side`."""
    scale = min(1.0, max_side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def write_strip(path: Path, pictures: Sequence[Picture], quality: int) -> None:
    """Pictures below each other as one JPEG; the same pictures give the same bytes.

    Args:
        path: a new file.
        pictures: uint8 RGB `[H, W, 3]`, all of one size, at least one.
        quality: JPEG's, 1 to 95.
    """
    strip = np.concatenate(pictures)
    Image.fromarray(strip).save(path, format="JPEG", quality=quality, subsampling=0)


def read_strip(path: Place, count: int) -> list[Picture]:
    """The pictures of a strip.

    Args:
        path: as in the column `frames`, below the run's folder.
        count: as in the column `frames_count`.

    Returns:
        uint8 RGB `[H, W, 3]`, in the order of time.

    Raises:
        KinemaError: no such strip, or it has not so many pictures.
    """
    try:
        with Image.open(io.BytesIO(read_bytes(path))) as image:
            strip = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise KinemaError(
            f"the frames of a clip cannot be read ({error})",
            where=str(path),
            hint="delete OUT/stages/frames to make them anew",
        ) from None
    if count < 1 or len(strip) % count:
        raise KinemaError(f"{len(strip)} rows are not {count} pictures", where=str(path))
    return list(strip.reshape(count, -1, *strip.shape[1:]))
