"""What analyzers see of a frame agrees with what FFmpeg makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from kinema.curation.look.frame_view import DecodedFrame, small_size
from tests.unit.curation.look.scene_footage import scene
from tests.unit.media.clips import write_clip


def _view(frame: av.VideoFrame) -> DecodedFrame:
    return DecodedFrame(frame, 0, 0.0, small_size(frame.height, frame.width), has_vectors=True)


def _frame(pix_fmt: str, matrix: int, full: bool, height: int = 180) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(scene(3, 1, height, 2 * height)[0], format="rgb24")
    made = rgb.reformat(
        format=pix_fmt,
        dst_colorspace={1: "ITU709", 5: "ITU601"}[matrix],
        dst_color_range="JPEG" if full else "MPEG",
    )
    made.colorspace, made.color_range = matrix, 2 if full else 1
    return made


@pytest.mark.parametrize(
    "pix_fmt",
    ["yuv420p", "yuv422p", "yuv444p", "nv12", "yuv420p10le", "yuv422p10le", "yuv444p12le",
     "p010le", "rgb24", "gbrp"],
)  # fmt: skip
@pytest.mark.parametrize("matrix", [1, 5])
@pytest.mark.parametrize("full", [False, True])
def test_colours_agree_with_swscale(pix_fmt: str, matrix: int, full: bool) -> None:
    if pix_fmt in ("rgb24", "gbrp"):
        frame = av.VideoFrame.from_ndarray(scene(3, 1, 180, 360)[0], format="rgb24")
        frame = frame.reformat(format=pix_fmt)
    else:
        frame = _frame(pix_fmt, matrix, full)
    view = _view(frame)
    wanted = cv2.resize(scene(3, 1, 180, 360)[0], (320, 160), interpolation=cv2.INTER_AREA)
    got = view.small_bgr[..., ::-1]
    assert got.shape == (160, 320, 3)
    # What swscale converts to BT.601 first has its chroma rounded twice.
    assert np.abs(got.astype(int) - wanted).mean() < (2.0 if pix_fmt != "p010le" else 3.0)
    converted = pix_fmt in ("rgb24", "gbrp", "p010le")
    bt709 = matrix == 1 and not converted
    grey = wanted @ np.array([0.2126, 0.7152, 0.0722] if bt709 else [0.299, 0.587, 0.114])
    assert np.abs(view.small.astype(int) - grey).mean() < 2.0
    assert view.luma.shape == (180, 360)
    assert view.luma.dtype == np.uint8


def test_luma_is_the_decoders_own_memory(tmp_path: Path) -> None:
    with av.open(str(write_clip(tmp_path / "a.mp4", scene(1, 2)))) as container:
        frame = next(container.decode(video=0))
        luma = _view(frame).luma
        plane: Any = frame.planes[0]
        assert np.shares_memory(luma, np.frombuffer(plane, np.uint8))
        assert np.array_equal(luma, frame.to_ndarray()[: frame.height])


@pytest.mark.parametrize(
    ("size", "small"), [((720, 1280), (180, 320)), ((1280, 720), (320, 180)), ((48, 64), (48, 64)),
                        ((1, 1000), (1, 320)), ((2160, 3840), (180, 320))],
)  # fmt: skip
def test_reduced_pictures_are_at_most_320_wide_or_high(
    size: tuple[int, int], small: tuple[int, int]
) -> None:
    assert small_size(*size) == small


def test_odd_sizes(tmp_path: Path) -> None:
    picture = scene(2, 1, 91, 355)[0]
    view = _view(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p"))
    assert view.luma.shape == (91, 355)
    assert view.small_bgr.shape == (82, 320, 3)
    wanted = cv2.resize(picture, (320, 82), interpolation=cv2.INTER_AREA)[..., ::-1]
    assert np.abs(view.small_bgr.astype(int) - wanted).mean() < 2.5


def test_a_grey_picture_has_no_colour() -> None:
    view = _view(av.VideoFrame.from_ndarray(np.full((40, 60), 126, np.uint8), format="gray"))
    assert np.ptp(view.small_bgr.astype(int), axis=2).max() == 0


def test_vectors_of_codecs_that_have_them(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(1, 5, speed=4.0), crf="20")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"flags2": "+export_mvs"}
        vectors = [_view(frame).motion_vectors for frame in container.decode(stream)]
    assert vectors[0] is not None
    assert len(vectors[0]) == 0  # a key frame
    assert all(v is not None and len(v) for v in vectors[1:])
    assert vectors[0].dtype == vectors[1].dtype  # type: ignore[union-attr]
    frame = av.VideoFrame.from_ndarray(np.zeros((8, 8), np.uint8), format="gray")
    assert DecodedFrame(frame, 0, 0.0, (8, 8), has_vectors=False).motion_vectors is None
