from __future__ import annotations

import numpy as np
import pytest

from kinema.data.world import COLOURS, held_out_scenes, sample_scenes
from kinema.data.world_render import render
from kinema.evaluation.hue import hue_distance, hue_of, measure_hue, nearest_colour

HUES = {name: hue_of(rgb) for name, rgb in COLOURS.items()}
SCENES = [*sample_scenes(seed=3, count=126), *held_out_scenes(seed=3)]


def blur(frames: np.ndarray, times: int) -> np.ndarray:
    """What a small autoencoder does to a clip: repeated averaging over 3 x 3 pixels."""
    values = frames.astype(np.float32)
    for _ in range(times):
        for axis in (1, 2):
            values = (np.roll(values, 1, axis) + values + np.roll(values, -1, axis)) / 3
    return values


def shown(frames: np.ndarray) -> str | None:
    clipped = np.clip(np.rint(frames), 0, 255).astype(np.uint8)
    return nearest_colour(measure_hue(clipped), HUES)


def test_every_rendered_clip_has_its_colour() -> None:
    assert [shown(render(s, frames=4)) for s in SCENES] == [s.colour for s in SCENES]


@pytest.mark.parametrize(("times", "noise"), [(2, 0.0), (4, 8.0), (6, 12.0)])
def test_blur_and_noise_do_not_change_the_verdict(times: int, noise: float) -> None:
    rng = np.random.default_rng(0)
    for scene in SCENES:
        frames = blur(render(scene, frames=4), times)
        assert shown(frames + rng.normal(0, noise, frames.shape)) == scene.colour, scene


def test_washed_out_colours_are_still_told() -> None:
    for scene in SCENES:
        frames = blur(render(scene, frames=4), 3)
        assert shown(frames.mean() + 0.5 * (frames - frames.mean())) == scene.colour


def test_wrong_colours_agree_only_by_chance() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.permutation([s.colour for s in SCENES])
    seen = [shown(render(s, frames=2)) for s in SCENES]
    agreement = np.mean([a == b for a, b in zip(seen, prompts, strict=True)])
    assert abs(agreement - 1 / len(COLOURS)) < 0.1


def test_a_clip_without_a_thing_has_no_colour() -> None:
    rng = np.random.default_rng(0)
    grey = np.clip(rng.normal(200, 6, (4, 32, 32, 3)), 0, 255).astype(np.uint8)
    assert nearest_colour(measure_hue(grey), HUES) is None
    pastel = np.full((4, 32, 32, 3), (235, 215, 210), np.uint8)
    assert nearest_colour(measure_hue(pastel), HUES) is None


def test_hues_are_circular() -> None:
    assert hue_distance(350, 10) == 20
    assert hue_distance(10, 350) == 20
    assert hue_distance(0, 180) == 180
    assert nearest_colour(measure_hue(np.full((1, 8, 8, 3), (230, 30, 60), np.uint8)), HUES) in (
        None,
        "red",
    )
    frame = np.full((1, 16, 16, 3), 200, np.uint8)
    frame[:, 4:9, 4:9] = (235, 20, 30)
    measured = measure_hue(frame)
    assert measured.hue is not None
    assert hue_distance(measured.hue, 357) < 3
    assert measured.purity > 0.99
