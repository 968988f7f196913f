"""From signals to clips: lengths, trimming, given cuts, turned labels, and why there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.curation.config import CurateRecipe, ScenesConfig
from kinema.curation.look.look import LookStage
from kinema.curation.look.segment import SegmentStage, found_spans, given_spans
from kinema.curation.stage import Bad, Places, Row, row_id
from tests.unit.curation.look.scene_footage import scene
from tests.unit.media.clips import write_clip

FPS = 25


def _signals(count: int, cuts: tuple[int, ...] = (), dark: slice = slice(0, 0)) -> dict[str, Any]:
    content = np.zeros((count, 3), np.float32)
    content[list(cuts)] = 80
    brightness = np.full(count, 120.0, np.float32)
    brightness[dark] = 3
    return {
        "times": np.arange(count) / FPS,
        "content": content,
        "brightness": brightness,
        "step": np.full(count, 50, np.float16),
        "back": np.full(count, 50, np.float16),
        "blend": np.zeros((count, 2, 4), np.float16),
        "damaged": np.zeros(count, bool),
    }


def _spans(signals: dict[str, Any], **settings: Any) -> tuple[list[tuple[int, int]], str | None]:
    times = np.append(signals["times"], len(signals["times"]) / FPS)
    spans, why = found_spans(signals, times, ScenesConfig(**settings), FPS)
    return [(span.start, span.end) for span in spans], why


def test_scenes_between_cuts_are_clips_and_short_ones_are_not() -> None:
    spans, why = _spans(_signals(300, (100, 130)))
    assert spans == [(0, 100), (130, 300)]
    assert why is None


def test_a_scene_of_just_the_least_length_is_a_clip() -> None:
    for start in range(7, 1500, 61):  # sums of frame times are off by rounding
        enough = _signals(start + 150, (start, start + 50))
        assert (start, start + 50) in _spans(enough, min_s=2.0)[0]
        short = _signals(start + 150, (start, start + 49))
        assert (start, start + 49) not in _spans(short, min_s=2.0)[0]


def test_long_scenes_are_split_evenly() -> None:
    spans, _ = _spans(_signals(1000), max_s=16.0)
    assert spans == [(0, 333), (333, 667), (667, 1000)]
    assert _spans(_signals(400), max_s=16.0)[0] == [(0, 400)]


def test_trimming_is_at_cuts_and_not_at_the_ends_of_the_file() -> None:
    assert _spans(_signals(300, (150,)), trim_s=0.4)[0] == [(0, 140), (160, 300)]
    assert _spans(_signals(300), trim_s=0.4)[0] == [(0, 300)]


def test_dark_frames_belong_to_no_clip() -> None:
    assert _spans(_signals(300, dark=slice(140, 150)))[0] == [(0, 140), (150, 300)]
    assert _spans(_signals(300, dark=slice(0, 50)))[0] == [(50, 300)]
    assert _spans(_signals(300, dark=slice(140, 150)), fades=False)[0] == [(0, 300)]


def test_why_there_is_no_clip() -> None:
    spans, why = _spans(_signals(30))
    assert spans == []
    assert why == "the longest scene has 1.20 s; clips have 2 s or more"
    spans, why = _spans(_signals(100, dark=slice(0, 100)))
    assert spans == []
    assert why == "no frame is lit and undamaged; clips have 2 s or more"


def test_given_cuts_are_taken_as_they_are() -> None:
    times = np.arange(2001) / FPS
    spans, why = given_spans([[0.0, 1.0, "a cat"], [1.0, 40.0, ""], [79, 90], [100, 110]], times)
    assert [(s.start, s.end, s.text) for s in spans] == [
        (0, 25, "a cat"), (25, 1000, None), (1975, 2000, None),
    ]  # fmt: skip
    assert why is None
    spans, why = given_spans([[100, 110, "x"]], times)
    assert spans == []
    assert why == "none of the 1 given cuts lies in the 80.00 s"


def test_a_cut_that_is_given_twice_is_one_clip() -> None:
    times = np.arange(101) / FPS
    spans, _ = given_spans([[0, 1, "a cat"], [0.001, 1.001, "a dog"], [0, 2, ""]], times)
    assert [(s.start, s.end, s.text) for s in spans] == [(0, 25, "a cat"), (0, 50, None)]


@pytest.mark.parametrize(
    "cuts",
    ["no json", "5", "{}", "[5]", "[[1]]", '[["a", "b"]]', "[[null, 2]]", "[[0, NaN]]",
     "[[0, 1, 7]]", '[[0, 1, "", "high"]]', '{"start": 1}'],
)  # fmt: skip
def test_a_list_that_is_none_costs_its_source_only(tmp_path: Path, cuts: str) -> None:
    row = {"id": "0" * 32, "path": "a.mp4", "duration": 4.0, "num_frames": 100, "_cuts": cuts}
    work = SegmentStage.of(CurateRecipe(**dict.fromkeys(["scenes", "motion", "quality", "hashes"])))
    bad = work.open(Places.below(str(tmp_path)))([row])[0]["segment"]
    if cuts == "{}":  # empty, as []
        assert not isinstance(bad, Bad)
        return
    assert isinstance(bad, Bad)
    assert bad.reason == "cuts"


def _looked(folder: Path, path: Path, **more: Any) -> Row:
    stage = LookStage()
    row: Row = {"id": row_id(path.name), "state": "1", "path": str(path),
                "todo": [part.name for part in stage.parts]}  # fmt: skip
    for found in stage.open(Places.below(str(folder)))([row])[0].values():
        assert not isinstance(found, Bad)
        row |= found
    return row | more


def _segmented(folder: Path, row: Row, **recipe: Any) -> tuple[list[dict[str, Any]], Any]:
    work = SegmentStage.of(CurateRecipe(**recipe)).open(Places.below(str(folder)))
    found = work([row])[0]["segment"]
    assert not isinstance(found, Bad)
    return json.loads(found["_clips"]), found


def test_columns_of_clips(tmp_path: Path) -> None:
    frames = np.concatenate([scene(1, 60), scene(2, 75, speed=4.0)])
    row = _looked(tmp_path, write_clip(tmp_path / "a.mp4", frames, crf="20"))
    clips, found = _segmented(tmp_path, row)
    assert found["clips"] == 2
    one, two = clips
    assert one["id"] == row_id(row["id"], 0, 60)
    assert (one["start_frame"], one["end_frame"], one["num_frames"]) == (0, 60, 60)
    assert (two["start_s"], two["end_s"], two["duration"]) == (2.4, 5.4, 3.0)
    assert (two["height"], two["width"], two["resolution"]) == (90, 160, 14400)
    assert two["fps"] == 25.0
    assert not two["whole"]
    assert two["camera_motion"] == "pan_right"
    assert {"sharpness", "border_top", "phash", "motion_mv", "flow"} <= set(two)
    clips, _ = _segmented(tmp_path, row, motion=None, quality=None, hashes=None)
    assert not {"sharpness", "phash", "flow"} & set(clips[0])


def test_a_file_is_one_clip_without_scenes(tmp_path: Path) -> None:
    row = _looked(tmp_path, write_clip(tmp_path / "a.mp4", scene(1, 12)))
    clips, found = _segmented(tmp_path, row, scenes=None)
    assert [(c["start_frame"], c["end_frame"], c["whole"]) for c in clips] == [(0, 12, True)]
    assert clips[0]["file_size"] == row["file_size"]
    assert found["no_clips"] is None


def test_given_cuts_come_with_their_captions(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(1, 50))
    row = _looked(tmp_path, path, _cuts=json.dumps([[0, 0.4, "first"], [0.4, 2.0, "second"]]))
    clips, _ = _segmented(tmp_path, row)
    assert [(c["end_frame"], c["text"]) for c in clips] == [(10, "first"), (50, "second")]


@pytest.mark.parametrize(("rotation", "label"), [(0, "pan_right"), (180, "pan_left")])
def test_labels_and_borders_are_of_the_displayed_picture(
    tmp_path: Path, rotation: int, label: str
) -> None:
    frames = scene(2, 75, 120, 160, speed=4.0)
    frames[:, :16] = 0
    row = _looked(tmp_path, write_clip(tmp_path / "a.mp4", frames, crf="20", rotation=rotation))
    (clip,), _ = _segmented(tmp_path, row)
    assert clip["camera_motion"] == label
    top, bottom = clip["border_top"], clip["border_bottom"]
    assert (top if rotation == 0 else bottom) == pytest.approx(16, abs=2)
    assert (bottom if rotation == 0 else top) == 0


def test_missing_signals_are_told(tmp_path: Path) -> None:
    row = _looked(tmp_path, write_clip(tmp_path / "a.mp4", scene(1, 12)))
    (tmp_path / "signals" / row["_signals_motion"]).unlink()
    work = SegmentStage().open(Places.below(str(tmp_path)))
    bad = work([row])[0]["segment"]
    assert isinstance(bad, Bad)
    assert bad.reason == "signals"
    assert "delete OUT/signals/" in bad.message
