"""Random access gives exactly the frames that decoding everything gives."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest

from kinema.media.errors import MediaError
from kinema.media.probe import probe
from kinema.media.read import count_by_decoding, iter_frames, read_at_fps, read_frames
from kinema.media.write import write_video
from tests.unit.media.clips import decode_everything, pictures, write_clip

UNEVEN = np.cumsum([0] + [256, 512, 1280, 128, 384] * 12)[:60].tolist()
KINDS = {
    "b_frames.mp4": {"bf": "3", "g": "12"},
    "b_pyramid_one_gop.mp4": {"bf": "8", "x264-params": "b-pyramid=normal", "g": "250"},
    "open_gop.mp4": {"bf": "3", "g": "10", "x264-params": "open-gop=1"},
    "open_gop.mkv": {"bf": "3", "g": "10", "x264-params": "open-gop=1"},
    "no_b_frames.mov": {"bf": "0", "g": "8"},
    "fragmented.mp4": {"g": "12", "mux": {"movflags": "frag_keyframe+empty_moov"}},
    "uneven.mp4": {"times": UNEVEN, "bf": "2", "g": "15"},
    "uneven.mkv": {"times": UNEVEN, "bf": "2", "g": "15"},
    "starts_late.mp4": {"times": [12800 + 512 * i for i in range(60)], "g": "12"},
    "b_frames.mkv": {"bf": "3", "g": "12"},
    "b_frames.avi": {"bf": "3", "g": "12"},
    "mpeg4.avi": {"codec": "mpeg4", "g": "12"},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "g": "12", "bf": "2"},
    "motion_jpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "20", "cpu-used": "8", "lag-in-frames": "16"},
    "vp8_hidden.webm": {"codec": "libvpx", "g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "transport.ts": {"bf": "2", "g": "12"},
    "loop.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.fixture(scope="module", params=KINDS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / request.param
    return write_clip(path, pictures(60), **KINDS[request.param])


def test_every_frame_alone_is_that_of_decoding_everything(clip: Path) -> None:
    truth = decode_everything(clip)
    assert probe(clip).num_frames == len(truth) == count_by_decoding(clip)
    assert np.array_equal(read_frames(clip), truth)
    for i in random.Random(0).sample(range(len(truth)), 12):
        assert np.array_equal(read_frames(clip, [i])[0], truth[i]), f"frame {i}"


def test_random_requests_come_in_the_order_asked_for(clip: Path) -> None:
    truth = decode_everything(clip)
    generator = random.Random(1)
    for _ in range(4):
        wanted = [generator.randrange(len(truth)) for _ in range(9)]  # unsorted, with repeats
        assert np.array_equal(read_frames(clip, wanted), truth[wanted])


def test_windows_of_consecutive_frames(clip: Path) -> None:
    truth = decode_everything(clip)
    for start in (0, 11, 17, len(truth) - 9):
        window = list(range(start, start + 9))
        assert np.array_equal(read_frames(clip, window), truth[window])


@pytest.mark.parametrize("name", ["b_frames.mp4", "uneven.mkv"])
def test_few_frames_are_decoded_for_a_few_requests(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / name, pictures(60), **KINDS[name] | {"g": "10"})
    decoded = []
    container_decode = av.container.InputContainer.decode

    def counting(self: av.container.InputContainer, *streams: object):
        for frame in container_decode(self, *streams):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr("kinema.media.read._frames_of", lambda v: counting(v.container, v.stream))
    read_frames(path, [3, 5, 41, 44])
    assert len(decoded) <= 4 + 3 + 12, "seeks over the key frames between 5 and 41"


def test_size_scales_in_the_decoder_and_rotation_is_applied_after(tmp_path: Path) -> None:
    frames = pictures(3, 32, 48)
    path = write_clip(tmp_path / "turned.mp4", frames, rotation=90)
    plain = decode_everything(path)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation == 90
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (32, 48, 270)
    assert np.array_equal(read_frames(path), np.rot90(plain, 1, axes=(1, 2)))
    assert read_frames(path, [1], size=(24, 16)).shape == (1, 24, 16, 3)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_turns_the_marked_corner_up(tmp_path: Path, degrees: int) -> None:
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    frames[:, :16, :16] = 255  # top left
    path = write_clip(tmp_path / "corner.mp4", frames, rotation=degrees)
    corner = {90: (-1, 0), 180: (-1, -1), 270: (0, -1)}[degrees]  # counter-clockwise
    picture = read_frames(path, [0])[0]
    assert picture[corner].min() > 200
    assert sum(picture[y, x].mean() > 100 for y in (0, -1) for x in (0, -1)) == 1


def test_time_sampling_of_an_uneven_clip_shows_what_a_player_shows(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "uneven.mp4", pictures(60), times=UNEVEN, g="15")
    truth, times = decode_everything(path), np.array(UNEVEN) / 12800
    moments = 0.3 + np.arange(20) / 16
    shown = [int(np.flatnonzero(times <= t + 1e-4)[-1]) for t in moments]
    assert len(set(np.diff(shown))) > 1, "the clip is uneven where it is read"
    got = read_at_fps(path, fps=16, num_frames=20, start_s=0.3)
    assert np.array_equal(got, truth[shown])
    assert probe(path).variable_rate


def test_time_sampling_at_the_own_rate_is_frame_by_frame(tmp_path: Path) -> None:
    path = tmp_path / "even.mp4"
    write_video(path, pictures(30), fps=30000 / 1001)
    assert not probe(path).variable_rate
    assert np.array_equal(read_at_fps(path, 30000 / 1001, 30), decode_everything(path))


def test_time_sampling_beyond_the_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.mp4"
    write_video(path, pictures(10), fps=10)
    with pytest.raises(MediaError, match=r"lasts 1\.000 s") as caught:
        read_at_fps(path, 10, 11)
    assert caught.value.reason == "too_short"


def test_more_frames_than_there_are_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.mp4"
    write_video(path, pictures(10), fps=10)
    with pytest.raises(MediaError, match="10 frames, wanted number 10") as caught:
        read_frames(path, [3, 10])
    assert caught.value.reason == "too_short"


def test_nothing_asked_nothing_given(tmp_path: Path) -> None:
    path = tmp_path / "short.mp4"
    write_video(path, pictures(4), fps=10)
    assert read_frames(path, []).shape == (0, 0, 0, 3)
    assert list(iter_frames(path, [])) == []


def test_a_colon_or_a_percent_sign_in_a_name_is_just_a_name(tmp_path: Path) -> None:
    for name in ("concat:a.mp4", "a%03d.mp4", "http:x.mp4", "-i.mp4"):
        write_video(tmp_path / name, pictures(2), fps=10)
        assert probe(tmp_path / name).num_frames == 2
