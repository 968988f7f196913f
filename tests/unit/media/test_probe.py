"""What probing says about files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kinema.media.image import read_image
from kinema.media.probe import probe
from kinema.media.write import write_image, write_video
from tests.unit.media.clips import pictures, write_clip


def test_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_video(path, pictures(50, 32, 48), fps=25)
    info = probe(path)
    assert (info.kind, info.num_frames, info.width, info.height) == ("video", 50, 48, 32)
    assert (info.fps, info.duration_s, info.codec) == (25.0, 2.0, "h264")
    assert (info.rotation, info.variable_rate) == (0, False)
    assert info.file_size == path.stat().st_size


@pytest.mark.parametrize("fps", [30000 / 1001, 12.5, 24, 1])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_frame_rates(tmp_path: Path, fps: float, ending: str) -> None:
    write_video(tmp_path / "a.mp4", pictures(10), fps=fps)
    path = tmp_path / "a.mp4"
    if ending == "mkv":  # clock of 1 ms: uneven only by rounding
        ticks = [round(12800 * i / fps) for i in range(10)]
        path = write_clip(tmp_path / "a.mkv", pictures(10), times=ticks)
    info = probe(path)
    assert info.fps == pytest.approx(fps, rel=2e-3)
    assert info.duration_s == pytest.approx(
        9 / fps + (0.04 if ending == "mkv" else 1 / fps), rel=0.02
    )
    assert not info.variable_rate


def test_average_rate_of_an_uneven_clip(tmp_path: Path) -> None:
    ticks = np.cumsum([0, 256, 512, 1280, 128, 384, 512]).tolist()
    info = probe(write_clip(tmp_path / "a.mp4", pictures(7), times=ticks))
    assert info.variable_rate
    assert info.fps == pytest.approx(6 / (ticks[-1] / 12800), rel=1e-3)


def test_an_image(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.zeros((20, 30, 3), np.uint8))
    info = probe(tmp_path / "a.png")
    assert (info.kind, info.num_frames, info.width, info.height) == ("image", 1, 30, 20)
    assert (info.codec, info.fps, info.duration_s) == ("png", 0.0, 0.0)


@pytest.mark.parametrize(("orientation", "degrees"), [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_orientation_of_photographs(tmp_path: Path, orientation: int, degrees: int) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:8, :8] = 255  # top left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    info = probe(tmp_path / "a.jpg")
    assert info.rotation == degrees
    assert (info.width, info.height) == ((20, 30) if degrees in (90, 270) else (30, 20))
    upright = read_image(tmp_path / "a.jpg")
    assert np.abs(upright.astype(int) - np.rot90(pixels, -degrees // 90)).max() < 60
    assert read_image(tmp_path / "a.jpg", size=(8, 12)).shape == (8, 12, 3)


def test_transparent_and_grey_images_become_rgb(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 4), (10, 20, 30, 40)).save(tmp_path / "a.png")
    Image.new("L", (5, 4), 77).save(tmp_path / "b.png")
    assert read_image(tmp_path / "a.png")[0, 0].tolist() == [10, 20, 30]
    assert read_image(tmp_path / "b.png")[0, 0].tolist() == [77, 77, 77]
