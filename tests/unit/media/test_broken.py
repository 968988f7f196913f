"""Every way in which a file can be unusable is told by its own reason, at once."""

from __future__ import annotations

import os
import pickle
import random
import socket
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kinema.media.errors import REASONS, MediaError
from kinema.media.probe import probe
from kinema.media.read import count_by_decoding, read_frames
from kinema.media.write import write_image, write_video
from tests.unit.media.clips import pictures, write_audio, write_clip


def reason(call: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        call(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    return caught.value.reason


def zero_boxes(data: bytes) -> bytes:
    """An mp4 of one frame with every duration in it set to 0."""
    fields = {  # box -> where in it a 32-bit duration stands (version 0)
        b"mvhd": 16,
        b"tkhd": 20,
        b"mdhd": 16,
        b"elst": 8,
        b"stts": 12,
    }
    changed = bytearray(data)
    for box, offset in fields.items():
        at = data.index(box) + 4 + offset
        changed[at : at + 4] = bytes(4)
    return bytes(changed)


def no_samples(path: Path) -> None:
    with av.open(str(path), "w", options={"movflags": "empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        container.start_encoding()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames; x264's data, then the index (no faststart)."""
    return write_clip(tmp_path_factory.mktemp("good") / "good.mp4", pictures(20, 64, 64))


def test_missing(tmp_path: Path) -> None:
    assert reason(probe, tmp_path / "nothing.mp4") == "missing"
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nothing.mp4")
    assert reason(probe, tmp_path / "dangling.mp4") == "missing"
    (tmp_path / "file").write_text("x")
    assert reason(probe, tmp_path / "file" / "a.mp4") == "missing"


def test_folder_pipe_socket_and_device_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "y.mp4").mkdir()
    os.mkfifo(tmp_path / "x.mp4")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s.mp4"))
    (tmp_path / "z.mp4").symlink_to("/dev/zero")
    for name, kind in {"y": "folder", "x": "FIFO", "s": "socket", "z": "device"}.items():
        path = tmp_path / f"{name}.mp4"
        assert reason(probe, path) == reason(read_frames, path) == "not_a_file"
        with pytest.raises(MediaError, match=kind):
            probe(path)
    listener.close()


def test_no_permission(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert reason(probe, good) == "unreadable"


def test_empty(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.png").touch()
    assert reason(probe, tmp_path / "a.mp4") == reason(probe, tmp_path / "a.png") == "empty"


def test_something_else(tmp_path: Path) -> None:
    for name in ("text.mp4", "text.jpg"):
        (tmp_path / name).write_text("This is a text, not a video.\n" * 40)
        assert reason(probe, tmp_path / name) == "not_media"
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(5000))
    assert reason(probe, tmp_path / "noise.mp4") == "not_media"


def test_sound_alone(tmp_path: Path) -> None:
    assert reason(probe, write_audio(tmp_path / "a.mp4")) == "no_video_stream"


def test_a_video_stream_without_frames(tmp_path: Path) -> None:
    no_samples(tmp_path / "a.mp4")
    assert reason(probe, tmp_path / "a.mp4") == "no_frames"


def test_one_frame_is_fine_and_one_frame_of_no_duration_is_not(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", pictures(1), fps=25)
    info = probe(tmp_path / "one.mp4")
    assert (info.num_frames, info.fps, info.duration_s) == (1, 25.0, 0.04)
    (tmp_path / "zero.mp4").write_bytes(zero_boxes((tmp_path / "one.mp4").read_bytes()))
    assert reason(probe, tmp_path / "zero.mp4") == "zero_duration"


@pytest.mark.parametrize("part", [0.1, 0.3, 0.7, 0.95])
def test_cut_off(good: Path, tmp_path: Path, part: float) -> None:
    write_video(tmp_path / "front.mp4", pictures(20, 64, 64), fps=25)  # index in front
    write_clip(tmp_path / "b.mkv", pictures(20, 64, 64))
    write_clip(tmp_path / "c.webm", pictures(20, 64, 64), codec="libvpx-vp9")
    for whole in (good, tmp_path / "front.mp4", tmp_path / "b.mkv", tmp_path / "c.webm"):
        data = whole.read_bytes()
        cut = tmp_path / f"cut{whole.suffix}"
        cut.write_bytes(data[: int(len(data) * part)])
        assert reason(probe, cut) == reason(count_by_decoding, cut) == "truncated", whole


def test_a_cut_image(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8"))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    assert reason(probe, tmp_path / "cut.png") == "truncated"


def test_damage_inside_the_frames(good: Path, tmp_path: Path) -> None:
    data = bytearray(good.read_bytes())
    start = data.index(b"mdat")
    middle = (start + data.index(b"moov")) // 2
    data[middle : middle + 40] = random.Random(0).randbytes(40)
    (tmp_path / "damaged.mp4").write_bytes(data)
    assert reason(count_by_decoding, tmp_path / "damaged.mp4") == "corrupt"
    assert reason(read_frames, tmp_path / "damaged.mp4") == "corrupt"


def test_a_playlist_cannot_reach_the_network(tmp_path: Path) -> None:
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", "http://127.0.0.1:9/a.ts"]
    (tmp_path / "list.mp4").write_text("\n".join([*lines, "#EXT-X-ENDLIST", ""]))
    assert reason(probe, tmp_path / "list.mp4") in ("not_media", "corrupt")


def test_a_huge_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png", np.zeros((64, 64, 3), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason(probe, tmp_path / "a.png") == "corrupt"


@pytest.mark.parametrize("code", REASONS)
def test_errors_survive_the_way_between_processes(code: str) -> None:
    error = MediaError(code, Path("a/b.mp4"), "detail")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.path, copy.detail) == (code, Path("a/b.mp4"), "detail")
    assert str(copy) == str(error)
    assert "detail" in str(error)
