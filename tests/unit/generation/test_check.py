from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kinema.config.errors import KinemaError
from kinema.diffusion.config import IDDPMConfig
from kinema.generation.check import (
    RequestError,
    check_request,
    frames_for_seconds,
    process_config,
    unseen_size_note,
)
from kinema.generation.config import GenerateRequest
from kinema.generation.pipeline import Pipeline
from kinema.models.config import ImageVAEConfig, VideoVAEConfig
from tests.unit.generation.tiny import tiny_config, tiny_parts, tiny_pipeline

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


@pytest.mark.parametrize(("seconds", "frames"), [(2, 16), (4, 32), (8, 64), (16, 128)])
def test_seconds_of_every_third_frame_are_the_lengths_of_1_1(seconds: float, frames: int) -> None:
    assert frames_for_seconds(seconds, 24.0, ImageVAEConfig(), frame_interval=3) == frames
    with pytest.raises(RequestError, match="no whole number of frames"):
        frames_for_seconds(seconds + 0.1, 24.0, ImageVAEConfig(), frame_interval=3)


def test_two_seconds_of_1_0_are_16_frames() -> None:
    assert frames_for_seconds(2, 8.0, ImageVAEConfig()) == 16


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


def test_a_class_must_exist() -> None:
    config = tiny_config("dit")
    picture = replace(GOOD, prompt="9", num_frames=1)
    check_request(picture, config)
    for prompt in ("10", "-1", "a kite", "1.0"):
        with pytest.raises(KinemaError, match=prompt):
            check_request(replace(picture, prompt=prompt), config)
    with pytest.raises(RequestError, match=r"aes has no effect .* class number"):
        check_request(replace(picture, aes=6.5), config)


def test_samplers_belong_to_iddpm() -> None:
    config = tiny_config("stdit2")
    check_request(replace(GOOD, sampler="dpm-solver"), config)
    solver = process_config(replace(GOOD, sampler="dpm-solver"), config)
    assert isinstance(solver, IDDPMConfig)
    assert solver.sampler == "dpm-solver"
    assert process_config(GOOD, config) == config.diffusion
    with pytest.raises(RequestError, match="rectified flow"):
        check_request(replace(GOOD, sampler="iddpm"), tiny_config())
    with pytest.raises(RequestError, match="1001 steps are more than the 1000"):
        check_request(replace(GOOD, num_sampling_steps=1001), config)


@pytest.mark.parametrize(
    "change",
    [
        {"condition_frame_length": 5},
        {"condition_frame_edit": 0.5},
        {"negative_prompt": "x", "cfg_scale": 1.0},
    ],
)
def test_what_would_do_nothing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="has no effect without"):
        check_request(replace(GOOD, **change), tiny_config())


def test_segments_of_the_prompt_are_checked() -> None:
    long = replace(GOOD, num_frames=34, prompt="|0| a |1| b", loop=2)
    assert check_request(long, tiny_config()).overlap_frames == 17
    with pytest.raises(KinemaError, match="only segment 0"):
        check_request(replace(long, loop=1), tiny_config())
    with pytest.raises(KinemaError, match="nothing would be new"):
        check_request(replace(long, num_frames=17), tiny_config())


def test_the_model_s_own_score_can_be_left_out() -> None:
    pipeline = Pipeline(replace(tiny_config(), aes=6.5), tiny_parts(tiny_config()), device="cpu")
    assert pipeline.request("a").aes == 6.5
    assert pipeline.request("a", aes=5.0).aes == 5.0
    assert pipeline.request("a", aes="none").aes is None


def test_shapes_of_models_trained_at_every_aspect_ratio_are_known_by_their_area() -> None:
    config = replace(tiny_config(), any_aspect_ratio=True)
    assert unseen_size_note(replace(GOOD, width=24, height=40), config) is None
    assert unseen_size_note(replace(GOOD, width=24, height=40), tiny_config()) is not None
    assert unseen_size_note(replace(GOOD, width=64, height=32), config) is not None
    assert unseen_size_note(replace(GOOD, width=32, num_frames=34), config) is not None
