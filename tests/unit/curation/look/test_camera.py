"""The camera's motion of rendered footage."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kinema.curation.config import MotionConfig
from kinema.curation.look.camera import LABELS, turned_label
from kinema.curation.look.motion import MotionAnalyzer

from .footage import Array, camera, info_of, look, motion_of, motion_of_file, texture

MOVES = {
    "pan_right": camera(40, right=lambda t: 1.0 * t),
    "pan_left": camera(40, right=lambda t: -1.0 * t),
    "tilt_up": camera(40, up=lambda t: 1.0 * t),
    "tilt_down": camera(40, up=lambda t: -1.0 * t),
    "zoom_in": camera(40, zoom=lambda t: 1.005**t),
    "zoom_out": camera(40, zoom=lambda t: 0.995**t),
    "roll_right": camera(40, roll=lambda t: 0.5 * t),
    "roll_left": camera(40, roll=lambda t: -0.5 * t),
    "mixed": camera(40, right=lambda t: 1.0 * t, up=lambda t: 1.0 * t),
    "static": camera(40),
}


def shaken(strength: float, *, pan: float = 0.0) -> Array:
    draw = np.random.default_rng(2)
    tremor = strength * draw.normal(size=(2, 60))
    return camera(60, right=lambda t: pan * t + tremor[0, t], up=lambda t: float(tremor[1, t]))


@pytest.mark.parametrize("label", MOVES)
def test_the_name_of_a_motion(label: str) -> None:
    assert label in LABELS
    columns = motion_of(MOVES[label])
    assert columns["camera_motion"] == label
    assert columns["jitter"] < 2e-4


def test_the_size_of_a_motion() -> None:
    # Per second: 30 pixels of 320 to the right, 15 up, zoom of 1.005 a frame, roll of 3 degrees.
    frames = camera(
        30,
        right=lambda t: 1.0 * t,
        up=lambda t: 0.5 * t,
        zoom=lambda t: 1.005**t,
        roll=lambda t: 0.1 * t,
    )
    analyzer = MotionAnalyzer(MotionConfig(flow_per_s=10.0), info_of(frames, 30.0))
    rates = look(analyzer, frames, 30.0)["camera"]
    wanted = [30 / 320, 15 / 320, 30 * np.log(1.005), np.deg2rad(3.0)]
    assert rates[0] == pytest.approx(wanted, rel=0.06)
    assert np.median(rates[:, 2:], 0) == pytest.approx(wanted[2:], rel=0.06)


def test_a_thing_that_moves_before_a_fixed_camera() -> None:
    frames = camera(60)
    thing = texture(80, 80, seed=5)
    for t, frame in enumerate(frames):
        frame[40:120, 3 * t : 3 * t + 80] = thing
    columns = motion_of(frames)
    assert columns["camera_motion"] == "static"
    assert columns["flow"] > 1
    assert columns["static_share"] == 0


def test_a_thing_that_hides_the_wall_for_a_moment() -> None:
    frames = camera(90)
    thing = texture(180, 1320, seed=5)
    for t in range(30, 50):
        frames[t] = thing[:, 20 * t : 20 * t + 320]
    assert motion_of(frames)["camera_motion"] == "static"


def test_a_plain_wall_says_nothing() -> None:
    plain = np.full((40, 180, 320), 128, np.uint8)
    assert motion_of(plain)["camera_motion"] is None


def test_shake() -> None:
    still, weak, strong = (motion_of(shaken(s)) for s in (0.0, 0.5, 3.0))
    assert strong["camera_motion"] == "shake"
    assert still["jitter"] < weak["jitter"] < strong["jitter"]
    # The change of a displacement, x(t + 1) - 2 x(t) + x(t - 1), of independent shifts in two
    # directions has sqrt(2 * 6) times their size on root mean square.
    assert strong["jitter"] == pytest.approx(np.sqrt(12) * 3 / 320, rel=0.3)


def test_a_shaky_pan_is_a_pan_with_jitter() -> None:
    smooth, shaky = motion_of(shaken(0.0, pan=3.0)), motion_of(shaken(0.7, pan=3.0))
    assert smooth["camera_motion"] == shaky["camera_motion"] == "pan_right"
    assert shaky["jitter"] > 5 * smooth["jitter"]


def test_there_and_back_is_mixed() -> None:
    frames = camera(120, right=lambda t: 2.0 * (t if t < 60 else 120 - t))
    assert motion_of(frames)["camera_motion"] == "mixed"


@pytest.mark.parametrize("label", ["pan_right", "pan_left", "tilt_up", "tilt_down", "zoom_in"])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_labels_of_turned_videos(label: str, rotation: int) -> None:
    shown = MOVES[label]
    stored = np.ascontiguousarray(np.rot90(shown, rotation // 90, axes=(1, 2)))
    found = motion_of(stored)["camera_motion"]
    assert turned_label(found, rotation) == label


SAMPLES = Path(__file__).parents[5] / "shared" / "videos"


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the sample videos are not here")
def test_real_footage() -> None:
    cv2.setNumThreads(1)
    names = {
        "classroom.mp4": "static",
        "bottles_on_table.mp4": "static",
        "cyclist_selfie.mp4": "shake",
        "phone_upside_down.mp4": "pan_right",  # as stored, upside down
        "highway_dashcam.mp4": "zoom_in",
    }
    found = {name: motion_of_file(SAMPLES / name) for name in names}
    assert {name: columns["camera_motion"] for name, columns in found.items()} == names
    calm = max(found["classroom.mp4"]["flow"], found["bottles_on_table.mp4"]["flow"])
    for name in ("cyclist_selfie.mp4", "phone_upside_down.mp4", "highway_dashcam.mp4"):
        assert found[name]["flow"] > 2 * calm
        assert found[name]["jitter"] > 3 * found["classroom.mp4"]["jitter"]
