"""Where scenes begin and end, by stored scores: other thresholds decode nothing again.

Hard cuts are found by PySceneDetect's own detectors, which are given the stored score of a frame
where they would work it out from pixels (BSD-3-Clause, Brandon Castellano, scenedetect.com).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinema.curation.config import ScenesConfig
from kinema.curation.look.analyzer import Signal
from kinema.curation.look.packages import scenedetect
from kinema.curation.look.scenes import FLASH_FRAMES, reaches

VERSION = 1
DISSOLVE_DIFFERENCE = 6.0
"""Grey levels (mean, of structure) between the pictures before and after a dissolve, at least."""
DISSOLVE_REST = 0.3
"""A dissolve's middle differs from the average of its ends by at most this share of their
difference. Two still pictures give 0.01, moving ones 0.1 to 0.2; camera motion gives 0.45 and
more (of three unrelated pictures: 0.87)."""
DISSOLVE_LEAST_REST = 0.3, 0.2
"""Somewhere in it at most this, for each of `REACHES_S`."""
DISSOLVE_ALIKE = (0.35, 0.7)
"""Correlation of the pictures before and after: at most the first somewhere in a dissolve, at most
the second throughout. A title that comes up over a picture stays above."""
DISSOLVE_AREA = 0.5
"""Share of the picture that changes, at least."""
DISSOLVE_EDGE_S = 0.2
"""A dissolve begins before, and ends after, what looks halfway: by a third of that at each side,
at most this long."""
FLASH_REST = 0.4, 10.0
"""After a flash the picture differs from the one before by at most this share of the jump, and so
many grey levels."""


@dataclass(frozen=True, slots=True)
class Gap:
    """What separates two scenes: frames `start` to `end` (exclusive) belong to neither."""

    start: int
    end: int
    """`start` for a hard cut."""
    kind: str
    """`cut`, `dissolve`, `dark`, `bright` or `damage`."""


def cuts_of(signals: Mapping[str, Signal], config: ScenesConfig, fps: float) -> list[Gap]:
    """Everything that separates scenes, by place; gaps do not overlap.

    Args:
        signals: of the part `scenes` (`SceneAnalyzer.signals` and `damaged`).
        config: which detectors, at which thresholds.
        fps: of the source, for PySceneDetect's clock.
    """
    total = len(signals["times"])
    gaps = [Gap(a, b, "damage") for a, b in _runs(signals.get("damaged", np.zeros(total, bool)))]
    if config.detector == "none":
        return gaps
    dark = signals["brightness"] < config.fade_threshold
    bright = signals["brightness"] >= 255 - config.fade_threshold
    if config.fades:
        gaps += [Gap(a, b, "dark") for a, b in _runs(dark)]
        gaps += [Gap(a, b, "bright") for a, b in _runs(bright & ~dark)]
    if config.dissolves:
        gaps += _dissolves(signals, dark | bright, fps)
    for place in _without_flashes(hard_cuts(signals, config, fps), signals):
        gaps.append(Gap(place, place, "cut"))
    return _apart(gaps, near=2)


def hard_cuts(signals: Mapping[str, Signal], config: ScenesConfig, fps: float) -> list[int]:
    """First frames after hard cuts, as PySceneDetect's detectors decide; ascending."""
    scenedetect()
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector, ContentDetector

    scores = content_scores(signals, config)

    class Content(ContentDetector):  # type: ignore[misc, unused-ignore]
        def _calculate_frame_score(self, timecode: Any, frame_img: Any) -> float:
            return float(scores[timecode.frame_num])

    class Adaptive(AdaptiveDetector):  # type: ignore[misc, unused-ignore]
        def _calculate_frame_score(self, timecode: Any, frame_img: Any) -> float:
            return float(scores[timecode.frame_num])

    detectors: list[Any] = []
    if config.detector in ("content", "both"):
        detectors.append(Content(threshold=config.content_threshold, min_scene_len=0))
    if config.detector in ("adaptive", "both"):
        detectors.append(
            Adaptive(
                adaptive_threshold=config.adaptive_threshold,
                min_content_val=config.adaptive_min_content,
                min_scene_len=0,
            )
        )
    found: set[int] = set()
    picture = np.zeros((1, 1, 3), np.uint8)
    for place in range(len(scores)):
        now = FrameTimecode(place, float(fps) or 25.0)
        for detector in detectors:
            found.update(cut.frame_num for cut in detector.process_frame(now, picture))
    return sorted(found)


def content_scores(
    signals: Mapping[str, Signal], config: ScenesConfig
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`[N]` weighted mean of the differences in hue, saturation and value."""
    weights = np.array([config.hue_weight, 1.0, 1.0])
    scores: np.ndarray[Any, np.dtype[np.float64]] = signals["content"] @ weights / weights.sum()
    return scores


def _without_flashes(cuts: list[int], signals: Mapping[str, Signal]) -> list[int]:
    """Cuts that the picture does not come back from within `FLASH_FRAMES`."""
    kept: list[int] = []
    until = -1
    for place in cuts:
        if place <= until:
            continue  # the end of a flash
        back, step = float(signals["back"][place]), float(signals["step"][place])
        if back < min(FLASH_REST[0] * step, FLASH_REST[1]):
            until = place + FLASH_FRAMES
        else:
            kept.append(place)
    return kept


def _dissolves(signals: Mapping[str, Signal], fading: Signal, fps: float) -> list[Gap]:
    gaps = []
    for number, reach in enumerate(reaches(fps)):
        difference, rest, alike, area = signals["blend"][:, number].astype(np.float32).T
        hit = (
            (difference >= DISSOLVE_DIFFERENCE)
            & (rest <= DISSOLVE_REST)
            & (alike <= DISSOLVE_ALIKE[1])
            & (area >= DISSOLVE_AREA)
        )
        # Before and after fades there are frames between black and a picture: the fade's own.
        near = np.convolve(fading, np.ones(2 * reach + 1))[reach:-reach] > 0
        for start, end in _runs(hit & ~near, join=2):
            best = alike[start:end].min(), rest[start:end].min()
            if best[0] <= DISSOLVE_ALIKE[0] and best[1] <= DISSOLVE_LEAST_REST[number]:
                edge = min(round((end - start) / 3), round(DISSOLVE_EDGE_S * fps))
                gaps.append(Gap(max(0, start - edge), min(len(hit), end + edge), "dissolve"))
    return gaps


def _runs(mask: Signal, join: int = 0) -> list[tuple[int, int]]:
    """(start, end) of runs of True; runs at most `join` frames apart are one."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    runs: list[tuple[int, int]] = []
    for start, end in edges.reshape(-1, 2).tolist():
        if runs and start - runs[-1][1] <= join:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def _apart(gaps: list[Gap], near: int) -> list[Gap]:
    """Gaps in order; those that overlap, or stand at most `near` frames apart, become one."""
    merged: list[Gap] = []
    for gap in sorted(gaps, key=lambda g: (g.start, -g.end)):
        if merged and gap.start - merged[-1].end <= near:
            last = merged[-1]
            kind = last.kind if last.end - last.start >= gap.end - gap.start else gap.kind
            start, end = last.start, max(last.end, gap.end)
            if last.kind == gap.kind == "cut":
                start = end = last.start
            merged[-1] = Gap(start, end, kind)
        else:
            merged.append(gap)
    return merged
