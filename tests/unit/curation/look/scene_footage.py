"""Rendered footage whose cuts, fades, dissolves and flashes are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kinema.curation.config import ScenesConfig
from kinema.curation.look.analyzer import Signal
from kinema.curation.look.cuts import Gap, cuts_of
from kinema.curation.look.look import Seen, watch
from kinema.curation.look.scenes import SceneAnalyzer

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
FPS = 25


def scene(seed: int, count: int, height: int = 90, width: int = 160, speed: float = 1.0) -> Pixels:
    """`[count, height, width, 3]`: a coloured cloud that drifts by `speed` pixels per frame."""
    rng = np.random.default_rng(seed)
    room = int(abs(speed) * count) + 2
    noise = rng.uniform(0, 255, (height, width + room, 3)).astype(np.float32)
    cloud = cv2.GaussianBlur(noise, (0, 0), 5)
    low, high = cloud.min(), cloud.max()
    picture = ((cloud - low) / (high - low) * 200 + 25).astype(np.uint8)
    return np.stack([picture[:, int(speed * t) : int(speed * t) + width] for t in range(count)])


def dissolve(one: Pixels, two: Pixels, frames: int) -> Pixels:
    """The last `frames` of `one` run over into the first of `two`."""
    share = ((np.arange(frames) + 1) / (frames + 1)).reshape(-1, 1, 1, 1)
    both = one[-frames:] * (1 - share) + two[:frames] * share
    return np.concatenate([one[:-frames], both.astype(np.uint8), two[frames:]])


def fade(frames: Pixels, level: int, first: int, last: int) -> Pixels:
    """The first and last so many frames come from, and go to, a plain grey `level`."""
    share = np.ones(len(frames))
    share[:first] = np.linspace(0, 1, first, endpoint=False)
    share[len(frames) - last :] = np.linspace(1, 0, last)
    share = share.reshape(-1, 1, 1, 1)
    return (frames * share + level * (1 - share)).astype(np.uint8)


def seen(path: Path) -> Seen:
    return watch(path, lambda info: {"scenes": SceneAnalyzer(ScenesConfig(), info)})


def signals(path: Path) -> dict[str, Signal]:
    found = seen(path)
    return found.signals["scenes"] | {"damaged": found.damaged, "keys": found.keys}


def gaps(path: Path, fps: float = FPS, **settings: Any) -> list[Gap]:
    return cuts_of(signals(path), ScenesConfig(**settings), fps)
