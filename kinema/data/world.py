"""The procedural world: what can happen in it, how it is described, clips of it on disk.

One coloured shape moves in one direction, or rests, before a quiet background. It stands in for
real footage where there is none: each clip's content is known, so that what a model has learnt
from it can be measured. `world_render` draws it.
"""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kinema.config.errors import KinemaError
from kinema.config.settings import settings

COLOURS = {
    "red": (230, 36, 44),
    "yellow": (247, 206, 20),
    "green": (30, 186, 58),
    "cyan": (22, 199, 214),
    "blue": (46, 72, 236),
    "magenta": (226, 40, 212),
}
"""Name -> sRGB. Hues (358, 49, 129, 185, 232, 305 degrees) are at least 47 degrees apart."""
SHAPES = ("circle", "square", "triangle", "star", "heart")
SIZES = {"small": 0.17, "large": 0.26}
"""Name -> radius as a fraction of the picture's side."""
MOTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "still": (0.0, 0.0),
}
"""Name -> direction in the picture, x to the right and y down."""
BACKGROUNDS = ("grey", "pastel", "gradient", "striped", "cloudy")
"""All of low saturation, so that the hue of the shape stands out. Each comes light or dark."""

WORDINGS = (
    "a {size} {colour} {shape} {moving} on a {background} background",
    "a {colour} {shape} {moving}",
    "a {size} {colour} {shape} {moving}",
    "{background} background, {colour} {shape} {moving}",
    "a clip of a {colour} {shape} that is {size} and {moving}",
    "there is a {size} {colour} {shape}, {moving}, in front of a {background} backdrop",
)
_MOVING = {
    "left": ("moving left", "moving to the left", "gliding left"),
    "right": ("moving right", "moving to the right", "gliding right"),
    "up": ("moving up", "moving upwards", "rising up"),
    "down": ("moving down", "moving downwards", "sinking down"),
    "still": ("standing still", "not moving", "resting still"),
}

Combination = tuple[str, str, str]
"""Colour, shape and motion."""


@settings
class WorldSpec:
    """How many clips, and their form."""

    seed: int = 0
    """The same seed and spec give the same bytes."""
    count: int = 300
    """Clips to write."""
    size: int = 64
    """Height and width in pixels."""
    frames: int = 20
    """Frames of each clip."""
    fps: float = 8.0
    """Frames per second."""
    hold_out: int = 24
    """Combinations of colour, shape and motion that no clip shows."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.frames < 1 or self.fps <= 0:
            raise ValueError("count, frames and fps must be above 0")
        if self.size < 16 or self.size % 2:
            raise ValueError(f"size is {self.size}, must be even and at least 16")


@dataclass(frozen=True, slots=True)
class Scene:
    """What one clip shows. `seed` decides place, tint and texture."""

    colour: str
    shape: str
    size: str
    motion: str
    background: str
    seed: int

    @property
    def combination(self) -> Combination:
        return self.colour, self.shape, self.motion


def caption(scene: Scene, wording: int = 0) -> str:
    """The scene in words; `wording` counts through all ways of saying it, any integer is valid."""
    ways = _MOVING[scene.motion]
    way, template = divmod(wording % (len(ways) * len(WORDINGS)), len(WORDINGS))
    return WORDINGS[template].format(
        size=scene.size,
        colour=scene.colour,
        shape=scene.shape,
        moving=ways[way],
        background=scene.background,
    )


def held_out_combinations(*, seed: int, count: int = 24) -> list[Combination]:
    """`count` combinations to keep out of training, spread evenly over colours, shapes, motions.

    Fewer are the first of more, so that a test of 6 prompts fits a world that holds out 24.

    Raises:
        KinemaError: more than a third of all are asked for, so that training would miss too much.
    """
    everything = list(itertools.product(COLOURS, SHAPES, MOTIONS))
    if not 0 <= count <= len(everything) // 3:
        raise KinemaError(f"cannot hold out {count} of {len(everything)} combinations, at most "
                          f"{len(everything) // 3}")  # fmt: skip
    _rng(seed, "hold out").shuffle(everything)
    used: dict[str, int] = {}
    chosen: list[Combination] = []
    for _ in range(count):
        best = min(
            (c for c in everything if c not in chosen),
            key=lambda c: sum(used.get(part, 0) ** 2 for part in c),
        )
        chosen.append(best)
        for part in best:
            used[part] = used.get(part, 0) + 1
    return chosen


def sample_scenes(*, seed: int, count: int, hold_out: int = 24) -> list[Scene]:
    """Scenes for training: all combinations but the held-out ones, equally often."""
    excluded = set(held_out_combinations(seed=seed, count=hold_out))
    allowed = [c for c in itertools.product(COLOURS, SHAPES, MOTIONS) if c not in excluded]
    scenes: list[Scene] = []
    for lap in range(-(-count // len(allowed))):
        order = _rng(seed, "order", lap).permutation(len(allowed))
        for index in order[: count - len(scenes)]:
            scenes.append(_scene(allowed[index], seed, "train", len(scenes)))
    return scenes


def held_out_scenes(*, seed: int, count: int = 24) -> list[Scene]:
    """One scene for each of `count` combinations that are in no clip of a world of this seed.

    `count` must not exceed the world's `hold_out`.
    """
    combinations = held_out_combinations(seed=seed, count=count)
    return [_scene(c, seed, "held out", index) for index, c in enumerate(combinations)]


def write_world(folder: str | Path, spec: WorldSpec) -> Path:
    """Write `spec.count` clips as `folder/clips/00000.mp4` and so on, and `folder/captions.csv`.

    Returns:
        The captions file: `path,text` (what `kinema data index --captions` reads), and what each
        clip shows: `colour,shape,size,motion,background`.
    """
    from kinema.data.world_render import render
    from kinema.data.writing import writing
    from kinema.media.write import atomic_output, write_video
    from kinema.telemetry.progress import Progress

    folder = Path(folder)
    scenes = sample_scenes(seed=spec.seed, count=spec.count, hold_out=spec.hold_out)
    rows = []
    with Progress("rendering", total=len(scenes), unit="clip") as bar:
        for index, scene in enumerate(scenes):
            path = f"clips/{index:05d}.mp4"
            write_video(folder / path, render(scene, size=spec.size, frames=spec.frames), spec.fps)
            text = caption(scene, int(_rng(spec.seed, "wording", index).integers(1 << 16)))
            look = (scene.colour, scene.shape, scene.size, scene.motion, scene.background)
            rows.append((path, text, *look))
            bar.advance()
    captions = folder / "captions.csv"
    with (
        writing(captions),
        atomic_output(captions) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("path", "text", "colour", "shape", "size", "motion", "background"))
        table.writerows(rows)
    return captions


def _scene(combination: Combination, seed: int, purpose: str, index: int) -> Scene:
    colour, shape, motion = combination
    rng = _rng(seed, purpose, index)
    return Scene(
        colour=colour,
        shape=shape,
        size=str(rng.choice(list(SIZES))),
        motion=motion,
        background=str(rng.choice(BACKGROUNDS)),
        seed=int(rng.integers(1 << 31)),
    )


def _rng(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Draws keyed by what they are for, so that scene 7 is the same however many there are."""
    return np.random.default_rng([seed, index, *purpose.encode()])
