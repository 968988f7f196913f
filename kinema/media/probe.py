"""What a media file is, found out without decoding all of it."""

from __future__ import annotations

import numpy as np
from PIL import ImageOps

from kinema.media.container import check_file, open_video
from kinema.media.errors import MediaError
from kinema.media.frame_index import FrameIndex, container_index, packet_index
from kinema.media.image import open_image
from kinema.media.info import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaInfo
from kinema.media.read import upright_rgb
from kinema.media.stores import Place, suffix

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "MediaInfo", "probe"]

_EXIF_ORIENTATION = 0x0112
_EXIF_CLOCKWISE = {3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}


def probe(path: Place) -> MediaInfo:
    """Facts about a video or image file, told apart by the name's ending.

    Frames are counted exactly: from the container's table where that is consistent, else from
    all packets. The first picture is decoded, so that a file without one is found here.

    Raises:
        MediaError: the file cannot be used; `reason` says why.
    """
    if suffix(path) in IMAGE_SUFFIXES:
        return _probe_image(path)
    return _probe_video(path)


def _probe_image(path: Place) -> MediaInfo:
    size = check_file(path)
    with open_image(path) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        codec = (image.format or "").lower()
        upright = ImageOps.exif_transpose(image)
        return MediaInfo(
            kind="image",
            num_frames=1,
            width=upright.width,
            height=upright.height,
            fps=0.0,
            duration_s=0.0,
            codec=codec,
            rotation=_EXIF_CLOCKWISE.get(orientation, 0),
            variable_rate=False,
            file_size=size,
        )


def _probe_video(path: Place) -> MediaInfo:
    with open_video(path) as video:
        index = container_index(video) or packet_index(path)
        frame = next(video.container.decode(video.stream), None)
        if frame is None:
            raise MediaError("corrupt", path, "no frame can be decoded")
        picture = upright_rgb(frame)
        return MediaInfo(
            kind="video",
            num_frames=len(index),
            width=picture.shape[1],
            height=picture.shape[0],
            fps=average_rate(index, float(video.stream.average_rate or 0)),
            duration_s=index.duration_s,
            codec=video.stream.codec_context.name,
            rotation=-round(frame.rotation / 90) % 4 * 90,
            variable_rate=index.variable_rate,
            file_size=video.file_size,
        )


def average_rate(index: FrameIndex, declared: float) -> float:
    """Frames per second; the container's word where the frames agree with it, as it is exact."""
    if index.duration_s <= 0:
        return 0.0
    if len(index) == 1:
        return 1 / index.duration_s
    measured = (len(index) - 1) / float(index.seconds()[-1])
    return declared if np.isclose(measured, declared, rtol=0.005) else measured
