"""Scores per frame that PySceneDetect's detectors decide by."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from kinema.curation.config import ScenesConfig
from kinema.curation.look.analyzer import FrameView, Signal
from kinema.curation.look.probe import SourceInfo

VERSION = 1


class SceneAnalyzer:
    """Differences between neighbouring frames, as PySceneDetect's ContentDetector finds them on
    the reduced picture, and brightness, as its ThresholdDetector does."""

    def __init__(self, config: ScenesConfig, info: SourceInfo) -> None:
        self._last: Any = None
        self._content: list[tuple[float, float, float]] = []
        self._brightness: list[float] = []
        self._times: list[float] = []

    def frame(self, view: FrameView) -> None:
        bgr = view.small_bgr
        hsv = cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV)
        change = cv2.mean(cv2.absdiff(hsv, self._last)) if self._last is not None else (0.0,) * 4
        self._last = hsv
        self._content.append((change[0], change[1], change[2]))
        self._brightness.append(sum(cv2.mean(bgr)[:3]) / 3)
        self._times.append(view.time_s)

    def signals(self) -> dict[str, Signal]:
        """`content` [N, 3] (hue, saturation, value), `brightness` [N], `times` [N] (seconds)."""
        return {
            "content": np.array(self._content, np.float32).reshape(-1, 3),
            "brightness": np.array(self._brightness, np.float32),
            "times": np.array(self._times, np.float64),
        }
