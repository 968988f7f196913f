"""Scores of frames by which cuts, dissolves, flashes and fades are found afterwards (`cuts.py`)."""

from __future__ import annotations

from array import array
from collections import deque
from typing import Any

import cv2
import numpy as np

from kinema.curation.config import ScenesConfig
from kinema.curation.look.analyzer import FrameView, Signal
from kinema.curation.look.probe import SourceInfo

VERSION = 4
REACHES_S = 0.5, 1.0
"""A frame is compared with those so long before and after it: a dissolve of up to twice this
length shows in full, a longer one in part."""
FLASH_FRAMES = 6
"""A picture that is back to what it was within as many frames was a flash."""
_SIDE = 80
"""Pixels of the longer side of the pictures that dissolves and flashes are judged by."""
_BLUR = 11
"""Pixels of these: what is even over so many is light, not structure."""
_BLACK = 24
"""Grey level below which a pixel may belong to a black bar."""
_CHANGED = 4
"""Grey levels of structure from which a pixel counts as changed."""


Blend = tuple[float, float, float, float]


def reaches(fps: float) -> list[int]:
    """`REACHES_S` in frames."""
    return [
        min(60 * place, max(place, round(seconds * fps)))
        for place, seconds in enumerate(REACHES_S, start=1)
    ]


class SceneAnalyzer:
    """Differences between neighbouring frames, as PySceneDetect's ContentDetector finds them on
    the reduced picture; brightness, as its ThresholdDetector does; and what it has no detector
    for: how far a frame is the mean of an earlier and a later one (a dissolve), and whether the
    picture returns to what it was (a flash)."""

    def __init__(self, config: ScenesConfig, info: SourceInfo) -> None:
        self._reaches = reaches(info.fps)
        self._hsv: Any = None
        self._structure: deque[Any] = deque(maxlen=2 * self._reaches[-1] + 1)
        self._recent: deque[Any] = deque(maxlen=FLASH_FRAMES + 1)
        # Arrays, not lists: a film of eight hours has a million frames.
        self._content, self._brightness = array("f"), array("f")
        self._times = array("d")
        self._step, self._back = array("f"), array("f")
        self._blend = [array("f") for _ in self._reaches]

    def frame(self, view: FrameView) -> None:
        bgr = view.small_bgr
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        change = (0.0,) * 3 if self._hsv is None else cv2.mean(cv2.absdiff(hsv, self._hsv))
        self._hsv = hsv
        self._content.extend(change[:3])
        self._brightness.append(sum(cv2.mean(bgr)[:3]) / 3)
        self._times.append(view.time_s)
        tiny = _tiny(view.small)
        self._note_return(tiny)
        self._structure.append(_structure(tiny))
        for reach, blends in zip(self._reaches, self._blend, strict=True):
            if len(self._structure) > 2 * reach:
                three = (self._structure[i] for i in (-1 - 2 * reach, -1 - reach, -1))
                blends.extend(_blend(*three))

    def signals(self) -> dict[str, Signal]:
        """Arrays over frames:

        - `times` [N]: seconds;
        - `content` [N, 3]: mean difference to the frame before in hue (0..179), saturation, value;
        - `brightness` [N]: mean of blue, green and red;
        - `step`, `back` [N]: mean difference of luma to the frame before; the smallest difference
          of one of the `FLASH_FRAMES` next frames to the frame before;
        - `blend` [N, 2, 4]: of structure (luma without its local mean, so that changes of light do
          not count), for the frames each of `REACHES_S` before and after: their mean difference;
          the difference between this frame and their average, as a share of it; their correlation;
          the share of pixels that changed. Zeros at both ends of the file.
        """
        total = len(self._times)
        blend = np.zeros((total, len(self._reaches), 4), np.float32)
        for number, (reach, blends) in enumerate(zip(self._reaches, self._blend, strict=True)):
            if blends:
                blend[reach : total - reach, number] = np.reshape(blends, (-1, 4))
        return {
            "times": np.array(self._times, np.float64),
            "content": np.array(self._content, np.float32).reshape(-1, 3),
            "brightness": np.array(self._brightness, np.float32),
            "step": np.array(self._step, np.float16),
            "back": np.array(self._back, np.float16),
            "blend": blend.astype(np.float16),
        }

    def _note_return(self, tiny: Any) -> None:
        """`back` of frame i is known once the frames after it have been seen."""
        size = tiny.size
        for ago in range(2, len(self._recent) + 1):
            # The frame `ago` before this one is the one before the frame `ago - 1` before it.
            place = len(self._step) - (ago - 1)
            difference = cv2.norm(tiny, self._recent[-ago], cv2.NORM_L1) / size
            self._back[place] = min(self._back[place], difference)
        step = cv2.norm(tiny, self._recent[-1], cv2.NORM_L1) / size if self._recent else 0.0
        self._step.append(step)
        self._back.append(255.0)
        self._recent.append(tiny)


def _tiny(small: Any) -> Any:
    scale = min(1.0, _SIDE / max(small.shape))
    width, height = (max(1, round(side * scale)) for side in small.shape[::-1])
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_AREA)


def _structure(tiny: Any) -> tuple[Any, Any]:
    """Luma without its local mean, and where it is black."""
    return tiny.astype(np.float32) - cv2.blur(tiny, (_BLUR, _BLUR)), (tiny < _BLACK).view(np.uint8)


def _blend(one: Any, two: Any, three: Any) -> Blend:
    # The edges of black bars stay through every dissolve: they do not count.
    bars = one[1] & two[1] & three[1]
    if bars.any():
        away = cv2.boxFilter(bars, -1, (_BLUR, _BLUR), normalize=False) == 0
        before, now, after = (picture[0] * away for picture in (one, two, three))
    else:
        before, now, after = one[0], two[0], three[0]
    moved = np.abs(after - before)
    difference = float(moved.mean())
    if difference < 1.0:
        return difference, 1.0, 1.0, 0.0
    rest = float(np.abs(now - (before + after) / 2).mean()) / difference
    norm = float(np.sqrt(np.vdot(before, before) * np.vdot(after, after)))
    alike = float(np.vdot(before, after)) / norm if norm > 0 else 0.0
    return difference, rest, alike, float((moved > _CHANGED).mean())
