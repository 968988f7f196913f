from __future__ import annotations

from dataclasses import replace

import pytest

from kinema.config.errors import KinemaError
from kinema.generation.check import (
    RequestError,
    check_request,
    frames_for_seconds,
    unseen_size_note,
)
from kinema.generation.config import GenerateRequest
from kinema.models.config import VideoVAEConfig
from tests.unit.generation.tiny import tiny_config, tiny_pipeline

GOOD = GenerateRequest(prompt="a kite", width=64, height=32, num_frames=17)


def test_sizes_off_the_stride_are_refused_with_the_nearest_ones() -> None:
    with pytest.raises(RequestError, match="width 66 is not a multiple of 4") as caught:
        check_request(replace(GOOD, width=66), tiny_config())
    assert caught.value.hint == "width 64 or 68"
    with pytest.raises(RequestError, match="height 3 "):
        check_request(replace(GOOD, height=3), tiny_config())
    check_request(GOOD, tiny_config())


def test_lengths_that_the_autoencoder_cannot_make_are_refused() -> None:
    with pytest.raises(RequestError, match="50 frames") as caught:
        check_request(replace(GOOD, num_frames=50), tiny_config())
    assert caught.value.hint == "34 or 51 frames"
    for frames in (1, 17, 34, 51):
        check_request(replace(GOOD, num_frames=frames), tiny_config())


@pytest.mark.parametrize(("seconds", "frames"), [(2, 51), (4, 102), (8, 204), (16, 408)])
def test_seconds_at_24_frames_are_the_lengths_of_1_2(seconds: float, frames: int) -> None:
    assert frames_for_seconds(seconds, 24.0, VideoVAEConfig()) == frames


def test_seconds_in_between_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        frames_for_seconds(3, 24.0, VideoVAEConfig())
    assert "68 frames" in str(caught.value)
    assert "85 frames" in str(caught.value)
    assert frames_for_seconds(2, 8.0, VideoVAEConfig()) == 17


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"width": 0}, "width is 0"),
        ({"num_frames": -17}, "num_frames is -17"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"num_sampling_steps": 0}, "num_sampling_steps is 0"),
        ({"cfg_scale": -1.0}, "cfg_scale is -1"),
        ({"cfg_scale": float("nan")}, "cfg_scale.*finite"),
        ({"fps": 0.0}, "fps is 0"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, object], text: str) -> None:
    values = {"prompt": "a kite", "width": 32, "height": 32, "num_frames": 17, **change}
    with pytest.raises(KinemaError, match=text):
        tiny_pipeline().request(**values)  # type: ignore[arg-type]


def test_an_unseen_shape_is_mentioned() -> None:
    note = unseen_size_note(GOOD, tiny_config())
    assert note is not None
    assert "64x32" in note
    assert "32x32 17 frames" in note
    assert unseen_size_note(replace(GOOD, width=32), tiny_config()) is None
