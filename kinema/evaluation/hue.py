"""Which colour the thing in a clip has: a measure that needs no network.

For clips of one saturated thing before a background of low saturation, as in the procedural world.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_CHROMA = 0.14
"""Chroma (maximum minus minimum of R, G, B, in 0..1) below which a pixel counts as background."""
MIN_AREA = 0.008
"""Fraction of a frame that must be coloured for the clip to show a thing at all."""


@dataclass(frozen=True)
class HueMeasurement:
    """What was seen in a clip.

    Attributes:
        hue: degrees in [0, 360); None when nothing in the clip is coloured.
        area: coloured fraction of the pixels, mean over the frames.
        purity: length of the mean hue vector, 0 (all hues) to 1 (one hue).
    """

    hue: float | None
    area: float
    purity: float


def measure_hue(frames: np.ndarray[Any, Any]) -> HueMeasurement:
    """The hue of the thing in a clip.

    Each pixel's chroma above that of the background votes for its hue; the mean is circular. The
    background's own tint is taken out first: its colour is the median over all pixels of low
    chroma.

    Args:
        frames: uint8 `[T, H, W, 3]`, sRGB.
    """
    pixels = frames.reshape(-1, 3).astype(np.float32) / 255
    chroma = pixels.max(1) - pixels.min(1)
    grey = chroma <= max(MIN_CHROMA, float(np.quantile(chroma, 0.5)))
    tint = np.median(pixels[grey] - pixels[grey].mean(1, keepdims=True), axis=0)
    pixels = pixels - tint
    chroma = pixels.max(1) - pixels.min(1)
    # A pixel on the thing's edge mixes both: squares leave it little say.
    weight = np.where(chroma > MIN_CHROMA, chroma, 0.0) ** 2
    area = float((weight > 0).mean())
    if area < MIN_AREA:
        return HueMeasurement(None, area, 0.0)
    red, green, blue = pixels.T
    # Hexagonal hue as in HSV, by its plane: atan2(sqrt(3)(G - B), 2R - G - B) differs by < 1.2°.
    angle = np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    x = float((weight * np.cos(angle)).sum() / weight.sum())
    y = float((weight * np.sin(angle)).sum() / weight.sum())
    return HueMeasurement(math.degrees(math.atan2(y, x)) % 360, area, math.hypot(x, y))


def hue_of(rgb: tuple[int, int, int]) -> float:
    """Hue in degrees of an sRGB colour, on the scale of `measure_hue`."""
    red, green, blue = rgb
    angle = math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    return math.degrees(angle) % 360


def hue_distance(a: float, b: float) -> float:
    """Degrees between two hues the short way round, in [0, 180]."""
    return abs((a - b + 180) % 360 - 180)


def nearest_colour(measured: HueMeasurement, hues: Mapping[str, float]) -> str | None:
    """The named hue that is nearest to what was measured; None when nothing is coloured.

    Args:
        hues: name -> degrees.
    """
    hue = measured.hue
    if hue is None:
        return None
    return min(hues, key=lambda name: hue_distance(hue, hues[name]))
