"""Motion of rendered footage: the codec's vectors, flow, still clips."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kinema.curation.config import MotionConfig
from kinema.curation.look.motion import MotionAnalyzer, flow_score, motion_columns

from .footage import camera, encode, info_of, look, motion_of, motion_of_file, texture


def test_flow_is_in_pixels_of_576_x_320_in_a_third_of_a_second() -> None:
    # 2 pixels of 320 a frame = 36 of 576 in ten frames, in x; the mean of |x| and |y| is half.
    columns = motion_of(camera(40, right=lambda t: 2.0 * t))
    assert columns["flow"] == pytest.approx(18, rel=0.05)
    assert columns["static_share"] == 0
    diagonal = motion_of(camera(40, right=lambda t: 2.0 * t, up=lambda t: 2.0 * t))
    assert diagonal["flow"] == pytest.approx(18 + 320 / 180 * 2 * 10 / 2, rel=0.05)


def test_flow_depends_neither_on_frame_rate_nor_on_size() -> None:
    slow = motion_of(camera(30, right=lambda t: 2.0 * t), fps=30)["flow"]
    fast = motion_of(camera(60, right=lambda t: 1.0 * t), fps=60)["flow"]
    large = motion_of(camera(30, (360, 640), right=lambda t: 4.0 * t), fps=30)["flow"]
    assert fast == pytest.approx(slow, rel=0.05)
    assert large == pytest.approx(slow, rel=0.05)


def test_portrait_pictures_are_turned() -> None:
    flow = np.zeros((320, 180, 2), np.float32)
    flow[..., 1] = 30.0
    assert flow_score(flow) == pytest.approx(30 / 3 * (576 / 320) / 2)


def test_a_still_clip() -> None:
    columns = motion_of(camera(45))
    assert columns["flow"] < 0.05
    assert columns["static_share"] == 1.0
    assert columns["camera_motion"] == "static"
    assert columns["jitter"] < 1e-4


def test_noise_and_light_are_no_motion() -> None:
    draw = np.random.default_rng(1)
    frames = 0.8 * camera(45) + 10
    frames += draw.normal(0, 4, frames.shape) + np.linspace(0, 30, 45)[:, None, None]
    columns = motion_of(np.clip(frames, 0, 255).astype(np.uint8))
    assert columns["static_share"] == 1.0
    assert columns["camera_motion"] == "static"


def test_what_stands_half_of_the_time() -> None:
    frames = camera(120, right=lambda t: 2.0 * max(0, t - 60))
    assert motion_of(frames)["static_share"] == pytest.approx(0.5, abs=0.1)


def test_a_pair_across_a_cut_belongs_to_no_clip() -> None:
    first, second = camera(15), camera(30, seed=1)
    frames = np.concatenate([first, second])
    analyzer = MotionAnalyzer(MotionConfig(flow_per_s=30.0), info_of(frames, 30.0))
    signals = look(analyzer, frames, 30.0)
    assert motion_columns(signals, 0, 45)["flow"] > 0.2
    for start, end in ((0, 15), (15, 45)):
        columns = motion_columns(signals, start, end)
        assert columns["flow"] < 0.05
        assert columns["static_share"] == 1.0


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "3"}])
def test_vectors_tell_the_speed_whatever_the_frames_refer_to(
    tmp_path: Path, options: dict[str, str]
) -> None:
    # 6 pixels a frame of 640 + 384: 0.0059 of width + height.
    frames = camera(36, (384, 640), right=lambda t: 6.0 * t)
    columns = motion_of_file(encode(tmp_path / "a.mp4", frames, preset="fast", **options))
    assert columns["motion_mv"] == pytest.approx(6 / 1024, rel=0.12)
    assert columns["motion_mv_patch"] == pytest.approx(6 / 1024, rel=0.35)


def test_the_patch_that_moves_least(tmp_path: Path) -> None:
    wall = texture(512, 512, seed=3)
    frames = np.repeat(wall[None], 24, 0)
    for t in range(24):  # three of the four 256-pixel patches move, the last does not
        frames[t, :256] = np.roll(wall, 4 * t, 1)[:256]
        frames[t, 256:, :256] = np.roll(wall[256:, :256], 4 * t, 1)
    columns = motion_of_file(encode(tmp_path / "a.mp4", frames))
    assert columns["motion_mv"] > 0.00098
    assert columns["motion_mv_patch"] < 0.05 * columns["motion_mv"]


def test_a_still_file_is_below_the_published_thresholds(tmp_path: Path) -> None:
    columns = motion_of_file(encode(tmp_path / "a.mp4", camera(30, (288, 512))))
    assert columns["motion_mv"] < 0.00098
    assert columns["motion_mv_patch"] < 1e-6


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libx265"])
def test_codecs_that_export_no_vectors_give_null(tmp_path: Path, codec: str) -> None:
    options = (
        {"cpu-used": "8", "deadline": "realtime"}
        if "vpx" in codec
        else {"x265-params": "log-level=none", "preset": "ultrafast"}
    )
    frames = camera(20, right=lambda t: 2.0 * t)
    columns = motion_of_file(encode(tmp_path / "a.mkv", frames, codec=codec, **options))
    assert columns["motion_mv"] is None
    assert columns["motion_mv_patch"] is None
    assert columns["flow"] == pytest.approx(18, rel=0.1)


def test_a_clip_of_one_frame_has_no_motion_to_tell() -> None:
    columns = motion_of(camera(1))
    assert set(columns.values()) == {None}


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (12, 12), (20, 1000)])
def test_pictures_too_small_for_flow(size: tuple[int, int]) -> None:
    draw = np.random.default_rng(0)
    columns = motion_of(draw.integers(0, 255, (20, *size), np.uint8))
    assert columns["flow"] is columns["camera_motion"] is columns["jitter"] is None


def test_signals_do_not_keep_the_pictures_that_were_shown() -> None:
    frames = camera(20, right=lambda t: 2.0 * t)
    analyzer = MotionAnalyzer(MotionConfig(), info_of(frames, 30.0))
    shared = np.empty_like(frames[0])

    def reused() -> list[np.ndarray]:  # type: ignore[type-arg]
        for picture in frames:
            shared[:] = picture
            yield shared  # type: ignore[misc]

    cv2.setNumThreads(1)
    columns = motion_columns(look(analyzer, reused(), 30.0), 0, len(frames))
    assert columns["flow"] == pytest.approx(18, rel=0.05)
