"""The procedural world: deterministic, balanced, drawn as described."""

from __future__ import annotations

import colorsys
import csv
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import from_dict
from kinema.data.world import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    WorldSpec,
    caption,
    held_out_combinations,
    held_out_scenes,
    sample_scenes,
    write_world,
)
from kinema.data.world_render import SHAPE_DISTANCE, render
from kinema.media.read import read_frames

ALL = list(itertools.product(COLOURS, SHAPES, MOTIONS))


def scene(**changes: Any) -> Scene:
    given = {"colour": "red", "shape": "circle", "size": "large", "motion": "left"}
    return Scene(**{**given, "background": "grey", "seed": 5, **changes})


def saturation(video: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    pixels = video.astype(float)
    return (pixels.max(-1) - pixels.min(-1)) / np.maximum(pixels.max(-1), 1)


def centre(frame: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean x, y of the saturated pixels."""
    y, x = np.nonzero(saturation(frame) > 0.4)
    return np.array((x.mean(), y.mean()))


def test_the_world_is_rich_enough() -> None:
    assert len(COLOURS) >= 6
    assert len(SHAPES) >= 5
    assert len(SIZES) >= 2
    assert set(MOTIONS) == {"left", "right", "up", "down", "still"}
    assert len(BACKGROUNDS) >= 3
    assert set(SHAPE_DISTANCE) == set(SHAPES)


def test_hues_are_far_apart() -> None:
    hues = sorted(colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0] * 360 for rgb in COLOURS.values())
    gaps = np.diff([*hues, hues[0] + 360])
    assert gaps.min() > 45


def test_a_scene_has_one_rendering() -> None:
    first = render(scene(), size=32, frames=3)
    assert first.shape == (3, 32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, render(scene(), size=32, frames=3))
    assert not np.array_equal(first, render(scene(seed=6), size=32, frames=3))


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_shapes_move_as_said_and_stay_inside(motion: str, size: str) -> None:
    for seed in range(4):
        video = render(scene(motion=motion, size=size, seed=seed), frames=8)
        moved = centre(video[-1]) - centre(video[0])
        assert np.sign(np.rint(moved / 8)).tolist() == list(MOTIONS[motion])
        shape = saturation(video) > 0.4
        border = np.concatenate([shape[:, 0], shape[:, -1], shape[:, :, 0], shape[:, :, -1]], 1)
        assert not border.any()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_only_the_shape_is_colourful_and_has_its_hue(background: str) -> None:
    for seed, (colour, rgb) in enumerate(COLOURS.items()):
        video = render(scene(colour=colour, background=background, seed=seed), frames=2)
        share = (saturation(video) > 0.4).mean()
        assert 0.1 < share < 0.3  # a disc of 0.24 of the side takes 18 %
        assert (saturation(video) < 0.2).mean() > 0.65
        pixels = video[saturation(video) > 0.5] / 255
        hues = np.array([colorsys.rgb_to_hsv(*pixel)[0] * 360 for pixel in pixels[::7]])
        wanted = colorsys.rgb_to_hsv(*(v / 255 for v in rgb))[0] * 360
        assert np.abs((hues - wanted + 180) % 360 - 180).max() < 12


def test_shapes_differ_and_sizes_differ() -> None:
    masks = {
        (shape, size): saturation(render(scene(shape=shape, size=size), frames=1)[0]) > 0.4
        for shape in SHAPES
        for size in SIZES
    }
    areas = {key: mask.mean() for key, mask in masks.items()}
    for shape in SHAPES:
        assert areas[shape, "large"] > 1.6 * areas[shape, "small"]
    for a, b in itertools.combinations(SHAPES, 2):
        union = (masks[a, "large"] | masks[b, "large"]).sum()
        assert (masks[a, "large"] & masks[b, "large"]).sum() / union < 0.9


def test_edges_are_smooth() -> None:
    frame = render(scene(background="grey", seed=1), frames=1)[0]
    partly = (saturation(frame) > 0.25) & (saturation(frame) < 0.6)
    assert partly.sum() > 20


def test_captions_name_the_scene_in_several_ways() -> None:
    ways = {caption(scene(), wording) for wording in range(100)}
    assert len(ways) >= 12
    for text in ways:
        assert "red" in text
        assert "circle" in text
        assert "left" in text
    assert caption(scene(), 10**9)
    for motion in MOTIONS:
        for wording in range(18):
            others = {"left", "right"} - {motion}
            assert not others & set(caption(scene(motion=motion), wording).split())


@pytest.mark.parametrize("seed", [0, 1, 77])
def test_held_out_combinations_are_never_trained_on(seed: int) -> None:
    held = held_out_scenes(seed=seed, count=24)
    combinations = [s.combination for s in held]
    assert len(set(combinations)) == 24
    assert combinations == held_out_combinations(seed=seed, count=24)
    assert held_out_scenes(seed=seed, count=6) == held[:6]
    trained = Counter(s.combination for s in sample_scenes(seed=seed, count=400, hold_out=24))
    assert not set(combinations) & set(trained)
    assert set(trained) == set(ALL) - set(combinations)
    assert max(trained.values()) - min(trained.values()) <= 1
    for part, names in enumerate((COLOURS, SHAPES, MOTIONS)):
        counts = Counter(c[part] for c in combinations)
        assert set(counts) == set(names)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_scenes_do_not_depend_on_how_many_there_are() -> None:
    assert sample_scenes(seed=3, count=300)[:50] == sample_scenes(seed=3, count=50)
    assert sample_scenes(seed=3, count=50) != sample_scenes(seed=4, count=50)


def test_too_much_held_out_is_refused() -> None:
    with pytest.raises(KinemaError, match="cannot hold out 51 of 150"):
        held_out_combinations(seed=0, count=51)


@pytest.mark.parametrize("wrong", [{"size": 63}, {"size": 8}, {"count": 0}, {"fps": 0.0}])
def test_wrong_specs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_dict(WorldSpec, wrong)


def test_written_worlds_are_equal_byte_for_byte(tmp_path: Path) -> None:
    spec = WorldSpec(seed=2, count=3, size=32, frames=5, hold_out=10)
    for name in ("a", "b"):
        assert write_world(tmp_path / name, spec) == tmp_path / name / "captions.csv"
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert [str(f) for f in files] == ["captions.csv", *(f"clips/0000{i}.mp4" for i in range(3))]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_written_clips_show_their_scenes(tmp_path: Path) -> None:
    spec = WorldSpec(seed=2, count=3, frames=5, hold_out=10)
    rows = list(csv.DictReader(write_world(tmp_path, spec).open()))
    scenes = sample_scenes(seed=2, count=3, hold_out=10)
    for row, shown in zip(rows, scenes, strict=True):
        assert row["colour"] == shown.colour
        assert shown.colour in row["text"]
        video = read_frames(tmp_path / row["path"]).astype(int)
        assert np.abs(video - render(shown, frames=5)).mean() < 4
