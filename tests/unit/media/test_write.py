"""Files are written whole, the same every time, and play in browsers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.media.read import read_frames
from kinema.media.write import MAX_GOP, atomic_output, write_image, write_video
from tests.unit.media.clips import pictures


def test_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.mp4"
    write_video(path, pictures(70), fps=24)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "index in front"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.profile == "High"
        assert stream.average_rate == 24
        keys = [i for i, p in enumerate(container.demux(stream)) if p.is_keyframe]
    assert max(np.diff([*keys, 70])) <= MAX_GOP


def test_colours_come_back(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (40, 90, 140)]
    for i, colour in enumerate(colours):
        path = tmp_path / f"{i}.mp4"
        write_video(path, np.broadcast_to(np.uint8(colour), (3, 32, 32, 3)), fps=8)
        got = read_frames(path, [1])[0].astype(int)
        assert np.abs(got - colour).max() <= 3, colour


def test_a_picture_comes_back(tmp_path: Path) -> None:
    frames = pictures(8, 64, 64)
    write_video(tmp_path / "a.mp4", frames, fps=8, crf=4)
    assert np.abs(read_frames(tmp_path / "a.mp4").astype(int) - frames).mean() < 8


def test_floats_and_bytes_write_the_same(tmp_path: Path) -> None:
    frames = pictures(5)
    as_floats = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
    write_video(tmp_path / "a.mp4", frames, fps=8)
    write_video(tmp_path / "b.mp4", as_floats, fps=8)
    write_video(tmp_path / "c.mp4", as_floats.numpy(), fps=8)
    data = {(tmp_path / f"{name}.mp4").read_bytes() for name in "abc"}
    assert len(data) == 1


def test_floats_out_of_range_are_cut_off_and_the_grid_is_exact(tmp_path: Path) -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 5).expand(3, 2, 5)
    write_image(tmp_path / "a.png", values)
    from kinema.media.image import read_image

    assert read_image(tmp_path / "a.png")[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = pictures(40, 64, 96)
    hashes, ballast = set(), []
    for i in range(6):
        ballast.append(np.ones(50_000 * i))  # other memory layouts
        write_video(tmp_path / "a.mp4", frames, fps=24)
        hashes.add(hashlib.sha256((tmp_path / "a.mp4").read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_quality_is_a_setting(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), np.uint8)
    for crf in (10, 40):
        write_video(tmp_path / f"{crf}.mp4", frames, fps=8, crf=crf)
    assert (tmp_path / "40.mp4").stat().st_size < (tmp_path / "10.mp4").stat().st_size / 2


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        (np.zeros((3, 31, 32, 3), np.uint8), "32x31 has an odd side"),
        (np.zeros((0, 32, 32, 3), np.uint8), "at least one frame"),
        (np.zeros((3, 32, 32), np.uint8), "not uint8"),
        (np.zeros((4, 32, 32, 3), np.float32), "not uint8"),
        (np.full((3, 2, 32, 32), np.nan, np.float32), "not all finite"),
        (torch.zeros(2, 3, 4, 32, 32), "not uint8"),
    ],
)
def test_refusals(tmp_path: Path, frames: object, complaint: str) -> None:
    with pytest.raises(KinemaError, match=complaint):
        write_video(tmp_path / "a.mp4", frames, fps=8)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"fps": 0}, {"fps": -1}, {"fps": 8, "crf": 52}])
def test_refused_settings(tmp_path: Path, settings: dict[str, int]) -> None:
    with pytest.raises(KinemaError, match="must be"):
        write_video(tmp_path / "a.mp4", pictures(2), **settings)


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KinemaError, match=r"\.mp4"):
        write_video(tmp_path / "a.avi", pictures(2), fps=8)
    with pytest.raises(KinemaError, match=r"\.png"):
        write_image(tmp_path / "a.jpg", pictures(1)[0])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.mp4"
    target.write_text("old")

    def fill_the_disk() -> None:
        with atomic_output(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
