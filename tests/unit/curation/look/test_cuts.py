"""What separates scenes, on rendered footage; and that stored scores decide as pictures do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.curation.config import ScenesConfig
from kinema.curation.look.cuts import cuts_of, hard_cuts
from kinema.curation.look.look import watch
from tests.unit.curation.look.scene_footage import FPS, dissolve, fade, gaps, scene, signals
from tests.unit.media.clips import write_clip


def _kinds(path: Path, **settings: Any) -> list[tuple[str, int]]:
    return [(gap.kind, gap.start) for gap in gaps(path, **settings)]


def test_hard_cuts_are_found_to_the_frame(tmp_path: Path) -> None:
    frames = np.concatenate([scene(1, 40), scene(2, 33), scene(3, 40)])
    path = write_clip(tmp_path / "a.mp4", frames, crf="20")
    assert _kinds(path) == [("cut", 40), ("cut", 73)]
    assert _kinds(path, detector="content") == [("cut", 40), ("cut", 73)]
    assert _kinds(path, detector="none") == []


@pytest.mark.parametrize("speed", [0.5, 3.0, 6.0])
def test_a_pan_is_no_cut(tmp_path: Path, speed: float) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(4, 75, speed=speed), crf="20")
    assert _kinds(path) == []


def test_a_flash_is_no_cut(tmp_path: Path) -> None:
    frames = scene(5, 100)
    frames[50:53] = 240
    path = write_clip(tmp_path / "a.mp4", frames, crf="20")
    assert _kinds(path, fades=False) == []
    frames = np.concatenate([frames[:53], scene(6, 40)])  # a cut that a flash hides
    path = write_clip(tmp_path / "b.mp4", frames, crf="20")
    assert [kind for kind, _ in _kinds(path, fades=False)] == ["cut", "cut"]


@pytest.mark.parametrize(
    ("length", "speed"), [(10, 0.0), (25, 0.0), (50, 0.0), (10, 0.2), (25, 0.2)]
)
def test_dissolves_belong_to_no_scene(tmp_path: Path, length: int, speed: float) -> None:
    one, two = scene(7, 100, speed=speed), scene(8, 100, speed=speed)
    path = write_clip(tmp_path / "a.mp4", dissolve(one, two, length), crf="20")
    (gap,) = gaps(path)
    begin, end = 100 - length, 100
    assert gap.kind == "dissolve"
    assert abs((gap.start + gap.end) / 2 - (begin + end) / 2) <= 0.2 * FPS
    assert abs(gap.start - begin) <= 0.2 * FPS + 2
    assert abs(gap.end - end) <= 0.2 * FPS + 2
    assert gaps(path, dissolves=False) == []


def test_changing_light_is_no_dissolve(tmp_path: Path) -> None:
    frames = scene(9, 100, speed=0)
    light = np.interp(np.arange(100), [40, 60], [1.0, 0.5]).reshape(-1, 1, 1, 1)
    path = write_clip(tmp_path / "a.mp4", (frames * light).astype(np.uint8), crf="20")
    assert _kinds(path) == []


@pytest.mark.parametrize(("level", "kind"), [(0, "dark"), (255, "bright")])
def test_fades_leave_out_what_is_plain(tmp_path: Path, level: int, kind: str) -> None:
    one = fade(scene(10, 80), level, 0, 15)
    two = fade(scene(11, 80), level, 15, 0)
    plain = np.full((10, *one.shape[1:]), level, np.uint8)
    path = write_clip(tmp_path / "a.mp4", np.concatenate([one, plain, two]), crf="16")
    (gap,) = gaps(path)
    assert gap.kind == kind
    assert 76 <= gap.start <= 80
    assert 90 <= gap.end <= 94
    assert kind not in {found for found, _ in _kinds(path, fades=False)}


def test_damage_separates(tmp_path: Path) -> None:
    found = signals(write_clip(tmp_path / "a.mp4", scene(12, 60)))
    found["damaged"][20:30] = True
    assert [(g.start, g.end, g.kind) for g in cuts_of(found, ScenesConfig(), FPS)] == [
        (20, 30, "damage")
    ]


class _Pictures:
    """Keeps what the detectors would see."""

    def __init__(self) -> None:
        self.bgr: list[Any] = []

    def frame(self, view: Any) -> None:
        self.bgr.append(view.small_bgr.copy())

    def signals(self) -> dict[str, Any]:
        return {"bgr": np.array(self.bgr)}


@pytest.mark.parametrize("threshold", [8.0, 27.0, 45.0])
def test_stored_scores_decide_as_pyscenedetect_does_on_the_pictures(
    tmp_path: Path, threshold: float
) -> None:
    from scenedetect import FrameTimecode
    from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

    frames = np.concatenate(
        [scene(1, 30), scene(2, 9), scene(3, 30, speed=9), fade(scene(4, 30), 0, 8, 8), scene(5, 9)]
    )
    path = write_clip(tmp_path / "a.mp4", frames, crf="20")
    pictures = watch(path, lambda info: {"p": _Pictures()}).signals["p"]["bgr"]
    stored = signals(path)
    weights = ContentDetector.Components(0.5, 1.0, 1.0, 0.0)

    def direct(detector: Any) -> list[int]:
        found = []
        for place, picture in enumerate(pictures):
            found += detector.process_frame(FrameTimecode(place, float(FPS)), picture)
        return sorted(cut.frame_num for cut in found)

    content = ScenesConfig(detector="content", content_threshold=threshold)
    wanted = direct(ContentDetector(threshold=threshold, min_scene_len=0, weights=weights))
    assert hard_cuts(stored, content, FPS) == wanted
    adaptive = ScenesConfig(adaptive_threshold=threshold / 10, adaptive_min_content=threshold)
    wanted = direct(
        AdaptiveDetector(
            adaptive_threshold=threshold / 10,
            min_content_val=threshold,
            min_scene_len=0,
            weights=weights,
        )
    )
    assert hard_cuts(stored, adaptive, FPS) == wanted
    assert threshold > 30 or wanted
    # The beginnings and ends of what is dark are its two cuts of either bias.
    for bias in (-1.0, 1.0):
        detector = ThresholdDetector(threshold=int(threshold), min_scene_len=0, fade_bias=bias)
        dark = [
            gap.start if bias < 0 else gap.end
            for gap in cuts_of(
                stored,
                ScenesConfig(fade_threshold=int(threshold), dissolves=False,
                             adaptive_min_content=1e9),
                FPS,
            )
        ]  # fmt: skip
        assert dark == direct(detector)
