"""Reading images, upright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kinema.media.container import check_file, file_errors
from kinema.media.errors import MediaError
from kinema.media.stores import Place, open_place


def read_image(
    path: Place, size: tuple[int, int] | None = None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image, upright (EXIF rotation applied); transparency is dropped.

    Args:
        path: an image file; of an animation, the first picture.
        size: (height, width) to scale to (bicubic).

    Returns:
        uint8 RGB `[H, W, 3]`.

    Raises:
        MediaError: the file cannot be used; `reason` says why.
    """
    with open_image(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        if size is not None:
            upright = upright.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        return np.array(upright)


@contextmanager
def open_image(path: Place) -> Iterator[Image.Image]:
    """An open image whose pixels are not decoded yet; Pillow's errors become MediaError."""
    check_file(path)
    with file_errors(path):
        try:
            with open_place(path) as file, Image.open(file) as image:
                yield image
        except UnidentifiedImageError:
            raise MediaError("not_media", path) from None
        except Image.DecompressionBombError as error:
            raise MediaError("corrupt", path, str(error)) from None
        except (OSError, SyntaxError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise MediaError(_damage(error), path, str(error)) from None


def _damage(error: Exception) -> str:
    return "truncated" if "truncated" in str(error).lower() else "corrupt"
