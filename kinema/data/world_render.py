"""Drawing the procedural world: anti-aliased, softly lit shapes on quiet backgrounds.

Lighting only scales a colour or mixes it with white, which leaves its hue as it is.
Coordinates are fractions of the picture's side, x to the right and y down.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

import numpy as np

from kinema.data.world import COLOURS, MOTIONS, SIZES, Scene

Array = np.ndarray[Any, np.dtype[Any]]

TRAVEL = 0.46
"""How far a moving shape goes during the clip."""
MARGIN = 0.03
"""Least distance of a shape from the border."""


def render(
    scene: Scene, *, size: int = 64, frames: int = 20
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The clip of `scene`: uint8 `[frames, size, size, 3]`."""
    rng = np.random.default_rng(scene.seed)
    radius = SIZES[scene.size]
    centres = _path(scene, radius, frames, rng)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    backdrop = _background(scene.background, x, y, rng)

    # Place of each pixel in units of the radius, seen from the shape's centre: [T, H, W].
    px = (x[None] - centres[:, 0, None, None]) / radius
    py = (y[None] - centres[:, 1, None, None]) / radius
    distance = SHAPE_DISTANCE[scene.shape]
    shadow = _smooth_step(0.28, -0.3, distance(px - 0.14, py - 0.22))
    coverage = np.clip(0.5 - distance(px, py) * (radius * size), 0, 1)

    picture = backdrop[None] * (1 - 0.32 * shadow[..., None])
    surface = _lit(np.array(COLOURS[scene.colour], np.float32) / 255, px, py)
    picture = picture + coverage[..., None] * (surface - picture)
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _path(scene: Scene, radius: float, frames: int, rng: np.random.Generator) -> Array:
    """Centre of the shape in each frame `[T, 2]`, always wholly inside the picture."""
    direction = np.array(MOTIONS[scene.motion], np.float32)
    low, high = radius + MARGIN, 1 - radius - MARGIN
    reach = np.abs(direction) * min(TRAVEL, high - low) / 2
    middle = rng.uniform(low + reach, high - reach)
    progress = np.linspace(-1, 1, frames, dtype=np.float32) if frames > 1 else np.zeros(1)
    return np.asarray(middle + progress[:, None] * direction * reach, np.float32)


def _lit(colour: Array, px: Array, py: Array) -> Array:
    """A surface lit from the upper left `[T, H, W, 3]`: a sheen there, shade at the lower right."""
    shade = 1 - 0.2 * _smooth_step(-0.2, 1.5, (px + py) * 0.7071)
    sheen = 0.34 * np.exp(-((px + 0.38) ** 2 + (py + 0.42) ** 2) / 0.16)
    base = colour * shade[..., None]
    return np.asarray(base + sheen[..., None] * (1 - base), np.float32)


def _background(kind: str, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """One still picture `[H, W, 3]` of saturation below 0.16."""
    light = rng.random() < 0.7
    value = rng.uniform(0.8, 0.94) if light else rng.uniform(0.2, 0.32)
    hue = rng.random()
    saturation = {"grey": 0.0, "pastel": 0.13}.get(kind, rng.uniform(0.02, 0.1))
    base = np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    if kind == "gradient":
        pattern = 0.26 * along
    elif kind == "striped":
        pattern = 0.05 * np.sin(2 * np.pi * (along * rng.uniform(3, 5) + rng.random()))
    elif kind == "cloudy":
        pattern = _clouds(x, y, rng)
    else:
        pattern = np.zeros_like(x)
    # Scaling keeps the saturation; a dark picture gets as much texture as a light one.
    return np.asarray(base * (1 + pattern / max(value, 0.5))[..., None], np.float32)


def _clouds(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Soft noise within ±0.12: a few plane waves of random direction, finer ones weaker."""
    total = np.zeros_like(x)
    for wave in range(8):
        frequency = 1.2 * 1.35**wave
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        ramp = x * np.cos(angle) + y * np.sin(angle)
        total += np.sin(2 * np.pi * frequency * ramp + phase) / frequency
    return 0.12 * total / np.abs(total).max()


def _smooth_step(start: float, end: float, value: Array) -> Array:
    """0 at `start`, 1 at `end` (which may be the smaller), smooth between."""
    t = np.clip((value - start) / (end - start), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


# Signed distances to shapes of radius about 1: negative inside.


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - np.float32(0.92)


def _square(x: Array, y: Array) -> Array:
    rounding = np.float32(0.14)
    over_x, over_y = np.abs(x) - (0.82 - rounding), np.abs(y) - (0.82 - rounding)
    outside = np.hypot(np.maximum(over_x, 0), np.maximum(over_y, 0))
    return np.asarray(outside + np.minimum(np.maximum(over_x, over_y), 0) - rounding)


def _triangle(x: Array, y: Array) -> Array:
    """Pointing up; three edges at the same distance from the middle, corners slightly rounded."""
    y = y - 0.18
    edges = (y, 0.866 * x - 0.5 * y, -0.866 * x - 0.5 * y)
    sharpness = 14.0
    total = sum(np.exp(sharpness * (np.clip(edge, -2, 2) - 0.55)) for edge in edges)
    return np.asarray(np.log(total) / sharpness, np.float32)


def _star(x: Array, y: Array) -> Array:
    """Five points, one up: all ten edges are one edge after folding the plane."""
    radius, tip = np.hypot(x, y), 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + tip / 2) % tip - tip / 2)
    fx, fy = radius * np.cos(angle), radius * np.sin(angle)
    outer = np.array((1.04, 0.0))
    inner = 0.5 * np.array((np.cos(tip / 2), np.sin(tip / 2)))
    edge = inner - outer
    normal = np.array((edge[1], -edge[0])) / np.hypot(*edge)
    return np.asarray((fx - outer[0]) * normal[0] + fy * normal[1], np.float32)


def _heart(x: Array, y: Array) -> Array:
    """A square on its corner and two discs on its upper edges."""
    side = np.float32(0.58)
    y = y - 0.22
    u, v = (x + y) * 0.7071, (x - y) * 0.7071
    square = np.maximum(np.abs(u), np.abs(v)) - side
    left = np.hypot(u + side, v) - side
    right = np.hypot(u, v - side) - side
    return np.minimum(square, np.minimum(left, right))


SHAPE_DISTANCE: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
}
