"""The one pass: frames as `kinema.media.read` numbers them, damage, bad files, what is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.config.errors import KinemaError
from kinema.curation.config import ScenesConfig
from kinema.curation.look.look import LookStage, watch
from kinema.curation.look.segment import SegmentStage, read_signals
from kinema.curation.stage import Bad, Places, Row
from kinema.media.probe import probe
from kinema.media.read import iter_frames
from tests.unit.curation.look.scene_footage import scene, seen
from tests.unit.media.clips import CLOCK, pictures, write_audio, write_clip

ONLY_SCENES = LookStage(motion=None, quality=None, hashes=None)
UNEVEN = [0, 512, 1024, 3000, 3512, 9000, 9512, 10000, 12000, 12512]


class _Looker:
    def __init__(self) -> None:
        self.seen: list[tuple[int, float, Any]] = []

    def frame(self, view: Any) -> None:
        self.seen.append((view.index, view.time_s, view.luma.copy()))

    def signals(self) -> dict[str, Any]:
        return {
            "index": np.array([index for index, _, _ in self.seen]),
            "time": np.array([time for _, time, _ in self.seen]),
            "luma": np.array([luma for _, _, luma in self.seen]),
        }


def _looked(path: Path) -> dict[str, Any]:
    return watch(path, lambda info: {"looker": _Looker()}).signals["looker"]


def _clip(folder: Path, kind: str) -> Path:
    frames = pictures(10, 64, 96)
    match kind:
        case "b_frames":
            return write_clip(folder / "a.mp4", frames, bf="3", g="6")
        case "edit_list":  # starts late: an edit list says so
            return write_clip(folder / "a.mp4", frames, times=[5120 + 512 * i for i in range(10)],
                              bf="2")  # fmt: skip
        case "variable_rate":
            return write_clip(folder / "a.mp4", frames, times=UNEVEN, bf="2")
        case "rotated":
            return write_clip(folder / "a.mp4", frames, rotation=90)
        case "matroska":
            return write_clip(folder / "a.mkv", frames, bf="2")
        case "vp9":
            return write_clip(folder / "a.webm", frames, codec="libvpx-vp9")
        case "transport":
            return write_clip(folder / "a.ts", frames, bf="2")
        case _:
            return write_clip(folder / "a.avi", frames, codec="mpeg4", bf="0")


@pytest.mark.parametrize(
    "kind",
    ["b_frames", "edit_list", "variable_rate", "rotated", "matroska", "vp9", "transport", "avi"],
)
def test_frames_are_numbered_as_readers_number_them(tmp_path: Path, kind: str) -> None:
    path = _clip(tmp_path, kind)
    found = _looked(path)
    read = dict(iter_frames(path))
    info = probe(path)
    assert found["index"].tolist() == list(range(len(read))) == list(range(info.num_frames))
    for place, picture in read.items():
        upright = np.rot90(found["luma"][place], 3 if kind == "rotated" and
                           info.rotation == 90 else (1 if info.rotation == 270 else 0))  # fmt: skip
        grey = picture @ np.array([0.299, 0.587, 0.114]) * (219 / 255) + 16
        assert np.abs(upright - grey).mean() < 2.0
    if kind == "variable_rate":
        assert found["time"] == pytest.approx([t * float(CLOCK) for t in UNEVEN])


def _row(path: Path, *todo: str) -> Row:
    return {"id": "ab" * 16, "state": "1", "path": str(path), "todo": list(todo)}


def _run(folder: Path, path: Path, *todo: str, stage: LookStage = ONLY_SCENES) -> dict[str, Any]:
    return dict(stage.open(Places.below(str(folder / "out")))([_row(path, *todo)])[0])


def test_probe_says_what_a_file_is(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", pictures(10, 64, 96), times=UNEVEN, rotation=90)
    found = _run(tmp_path, path, "probe")
    assert set(found) == {"probe"}
    info = probe(path)
    columns = found["probe"]
    for name in ("width", "height", "num_frames", "fps", "codec", "rotation", "variable_rate",
                 "file_size"):  # fmt: skip
        assert columns[name] == getattr(info, name)
    assert columns["duration"] == info.duration_s
    assert columns["aspect_ratio"] == columns["height"] / columns["width"]
    assert columns["audio"] is False
    assert columns["bit_rate"] > 0
    assert not (tmp_path / "out").exists()


def test_signals_are_written_once_and_the_same(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(1, 20))
    found = _run(tmp_path, path, "scenes", stage=LookStage())
    place = found["scenes"]["_signals_scenes"]
    assert place.startswith(f"ab/{'ab' * 16}.scenes-")
    file = tmp_path / "out" / "signals" / place
    before = file.read_bytes()
    signals = read_signals(str(file))
    assert len(signals["times"]) == len(signals["damaged"]) == 20
    assert signals["keys"].tolist() == [0]
    _run(tmp_path, path, "scenes")
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_thresholds_decode_nothing_again() -> None:
    def key(config: ScenesConfig) -> str:
        stage = LookStage(scenes=config, motion=None, quality=None, hashes=None)
        return {part.name: part.key for part in stage.parts}["scenes"]

    assert key(ScenesConfig()) == key(ScenesConfig(adaptive_threshold=9.0, min_s=0.5))
    assert [part.name for part in ONLY_SCENES.parts] == ["probe", "scenes"]


def test_frames_that_cannot_be_decoded_are_told_and_passed_over(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(2, 60, speed=3.0), g="20", bf="0", crf="20",
                      **{"x264-params": "scenecut=0"})  # fmt: skip
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    middle = start + (len(data) - start) * 2 // 5
    data[middle : middle + 600] = bytes(600)
    path.write_bytes(data)
    found = seen(path)
    hurt = np.flatnonzero(found.damaged)
    assert 0 < len(hurt) < 30
    assert hurt[-1] % 20 == 19  # to the next key frame
    assert len(found.signals["scenes"]["times"]) == 60
    result = _run(tmp_path, path, "scenes")["scenes"]
    assert result["damaged"] == len(hurt)


def test_a_file_that_is_mostly_damaged_is_bad(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(2, 40, speed=3.0), crf="20", bf="0")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    first = start + (len(data) - start) // 10
    data[first : start + (len(data) - start) * 9 // 10] = bytes(
        start + (len(data) - start) * 9 // 10 - first
    )
    path.write_bytes(data)
    bad = _run(tmp_path, path, "scenes")["scenes"]
    assert isinstance(bad, Bad)
    assert bad.reason == "corrupt"
    assert "of 40 frames" in bad.message


def test_broken_files_say_what_is_wrong(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", pictures(10)).read_bytes()
    cases = {"text.mp4": (b"not a video\n" * 40, "not_media"), "zero.mp4": (b"", "empty"),
             "cut.mp4": (whole[: len(whole) // 2], "truncated")}  # fmt: skip
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        for bad in _run(tmp_path, tmp_path / name, "probe", "scenes").values():
            assert isinstance(bad, Bad)
            assert bad.reason == reason
    bad = _run(tmp_path, write_audio(tmp_path / "sound.mp4"), "probe")["probe"]
    assert isinstance(bad, Bad)
    assert bad.reason == "no_video_stream"
    bad = _run(tmp_path, tmp_path / "none.mp4", "scenes")["scenes"]
    assert isinstance(bad, Bad)
    assert bad.reason == "missing"


BROKEN = Path(__file__).parents[5] / "shared" / "videos" / "broken"


@pytest.mark.skipif(not BROKEN.exists(), reason="the sample videos are not here")
@pytest.mark.parametrize(
    ("name", "reason"),
    [("truncated_no_moov.mp4", "truncated"), ("zero_bytes.mp4", "empty"),
     ("text_file.mp4", "not_media"), ("audio_only.mp4", "no_video_stream"),
     ("one_frame.mp4", None), ("zero_duration.mp4", "zero_duration"),
     ("no_samples.mp4", "no_frames")],
)  # fmt: skip
def test_broken_samples(tmp_path: Path, name: str, reason: str | None) -> None:
    for found in _run(tmp_path, BROKEN / name, "probe", "scenes").values():
        assert (found.reason if isinstance(found, Bad) else None) == reason


def test_long_sources_get_more_time() -> None:
    stage = LookStage(time_limit=10.0)
    assert stage.time_limit_s({"duration": 7200.0}) == 10.0 + 3 * 7200
    assert stage.time_limit_s({"state": "4000000000:1700000000"}) == 10.0 + 3 * 16000
    assert stage.time_limit_s({}) == 10.0


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(KinemaError, match=r"finding scenes needs the package scenedetect") as told:
        SegmentStage().open(Places.below("out"))
    assert "kinema[curate]" in str(told.value)
    SegmentStage(scenes=None).open(Places.below("out"))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(KinemaError, match="opencv-python-headless"):
        _ = LookStage().parts
