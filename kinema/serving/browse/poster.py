"""One small picture of a clip, made in a decode worker (so: without torch)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from kinema.media.container import open_video
from kinema.media.frame_index import container_index
from kinema.media.image import open_image, read_image
from kinema.media.info import IMAGE_SUFFIXES
from kinema.media.read import read_frames
from kinema.media.stores import Place, suffix
from kinema.media.write import atomic_output

SIDE = 480
"""Pixels of the longer side."""
QUALITY = 80
DARK = 12.0
"""Mean brightness (0..255) below which another picture is looked for."""
FAR = 96
"""Frames after a key frame from which on the key frame itself will do."""


def make_poster(place: Place, output: str, strip: str, shape: tuple[int, int]) -> None:
    """Write the middle picture of a clip as a JPEG.

    Args:
        place: a video or an image.
        output: the file to write.
        strip: pictures of the clip below each other, as curation writes them, or `""`.
        shape: height and width of the clip, to tell the pictures of a strip apart.

    Raises:
        MediaError: the file cannot be used.
    """
    picture = _of_strip(strip, shape) if strip else _of_media(place)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    with atomic_output(Path(output)) as temporary:
        picture.save(temporary, format="JPEG", quality=QUALITY)


def _of_strip(strip: str, shape: tuple[int, int]) -> Image.Image:
    with open_image(strip) as image:
        pictures = cut_strip(image.convert("RGB"), shape)
        return pictures[len(pictures) // 2]


def cut_strip(image: Image.Image, shape: tuple[int, int]) -> list[Image.Image]:
    """The pictures of a strip, from the first frame to the last.

    Args:
        image: equal pictures below each other.
        shape: height and width of the clip.
    """
    height, width = shape
    count = max(1, round(image.height / (image.width * height / width)))
    each = image.height // count
    return [image.crop((0, k * each, image.width, (k + 1) * each)) for k in range(count)]


def _of_media(place: Place) -> Image.Image:
    if suffix(place) in IMAGE_SUFFIXES:
        return Image.fromarray(read_image(place))
    picture = _at(place, 0.5)
    # The middle of a fade tells nothing.
    if _light(picture) > DARK:
        return picture
    return max((picture, _at(place, 0.2), _at(place, 0.8)), key=_light)


def _at(place: Place, share: float) -> Image.Image:
    """The picture at a share of the clip, or the key frame before it where that is far away."""
    with open_video(place) as video:
        index = container_index(video)
        target = 0
        if index is not None and len(index):
            target = int(len(index) * share)
            key = index.key_before(target)
            target = key if target - key > FAR else target
    return Image.fromarray(read_frames(place, [target])[0])


def _light(picture: Image.Image) -> float:
    return float(np.asarray(picture.resize((32, 32)).convert("L")).mean())
