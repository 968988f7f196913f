"""Indexing a folder: what becomes a row, what is reported, what a second run does again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.config.errors import KinemaError
from kinema.data import index as index_module
from kinema.data.index import IndexReport, index_folder
from kinema.data.manifest import Manifest
from kinema.media.info import MediaInfo
from kinema.media.write import write_image, write_video
from tests.unit.data.in_process_pool import InProcessPool

Index = Callable[..., IndexReport]


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setattr(index_module, "DecodePool", InProcessPool)
    return index_folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """a.mp4 (3 frames), b.mp4 (4), sub/c.mp4 (5), d.png, and two that are broken."""
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (5, 16, 32, 3), np.uint8)
    for name, count in (("a", 3), ("b", 4), ("sub/c", 5)):
        write_video(folder / f"{name}.mp4", frames[:count], 8)
    write_image(folder / "d.png", frames[0])
    (folder / "empty.mp4").touch()
    (folder / "words.mp4").write_text("no video at all, only words" * 20)
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_rows_and_report(index: Index, clips: Path, ending: str) -> None:
    output = clips / f"m.{ending}"
    result = index(clips, output)
    manifest = Manifest.read(output)
    assert result.rows == len(manifest) == 4
    assert [manifest.path(row) for row in range(4)] == ["a.mp4", "b.mp4", "d.png", "sub/c.mp4"]
    assert manifest.column("num_frames").tolist() == [3, 4, 1, 5]
    assert manifest.column("height").tolist() == [16] * 4
    assert manifest.column("width").tolist() == [32] * 4
    assert manifest.column("fps")[[0, 1, 3]].tolist() == [8, 8, 8]
    assert np.isnan(manifest.column("fps")[2])
    assert manifest.column("file_size")[0] == (clips / "a.mp4").stat().st_size
    assert all(manifest.absolute_path(row).is_file() for row in range(4))
    assert {r.path for r in result.refused} == {"empty.mp4", "words.mp4"}
    assert result.reasons() == {"empty": 1, "not_media": 1}
    assert {line["path"] for line in lines(result.report)} == {"empty.mp4", "words.mp4"}
    assert all(line["message"] for line in lines(result.report))


def test_without_any_caption_rows_are_kept(index: Index, clips: Path) -> None:
    result = index(clips, clips / "m.csv")
    manifest = Manifest.read(clips / "m.csv")
    assert result.captions.source == "none"
    assert manifest.kept.all()
    with pytest.raises(KinemaError, match="4 of 4 clips have no caption"):
        manifest.require_captions()


def test_captions_and_their_gaps(index: Index, clips: Path) -> None:
    table = clips.parent / "captions.csv"
    table.write_text("video,caption\nsub/c.mp4,a cat\na.mp4,\nb.mp4,a bird\ngone.mp4,a ghost\n")
    result = index(clips, clips / "m.parquet", captions=table)
    manifest = Manifest.read(clips / "m.parquet")
    assert [manifest.text(row) for row in range(4)] == ["", "a bird", "", "a cat"]
    assert manifest.kept.tolist() == [False, True, False, True]
    assert manifest.dropped() == {"no_caption": 2}
    assert result.without_caption == ["a.mp4", "d.png"]
    reported = {(line["path"], line["reason"]) for line in lines(result.report)}
    assert {("gone.mp4", "caption_without_file"), ("d.png", "no_caption")} <= reported
    manifest.require_captions()


def test_paths_fit_where_the_manifest_is(index: Index, clips: Path) -> None:
    index(clips, clips.parent / "m.csv")
    assert Manifest.read(clips.parent / "m.csv").path(0) == "clips/a.mp4"
    elsewhere = clips.parent / "elsewhere/m.csv"
    index(clips, elsewhere)
    assert Manifest.read(elsewhere).path(0) == str(clips / "a.mp4")
    index(clips, elsewhere, data_root=clips.parent)
    manifest = Manifest.read(elsewhere, data_root=clips.parent)
    assert manifest.path(0) == "clips/a.mp4"
    assert manifest.absolute_path(0).is_file()
    with pytest.raises(KinemaError, match="not below the data root"):
        index(clips, elsewhere, data_root=clips / "sub")


def test_an_interrupted_run_goes_on(index: Index, clips: Path) -> None:
    output = clips / "m.csv"
    InProcessPool.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        index(clips, output)
    assert not output.exists()
    result = index(clips, output)
    # The fourth was opened, and the run stopped before its successor; all four are known.
    assert InProcessPool.opened == ["c.mp4", "words.mp4"]
    assert result.reused == 4
    assert result.rows == 4
    assert result.reasons() == {"empty": 1, "not_media": 1}


def test_only_what_is_new_or_changed_is_opened_again(index: Index, clips: Path) -> None:
    output = clips / "m.csv"
    index(clips, output)
    first = output.read_bytes()
    index(clips, output)
    assert InProcessPool.opened == ["empty.mp4", "words.mp4"]  # refused by a finished run
    assert output.read_bytes() == first
    (clips / "a.mp4").replace(clips / "new.mp4")
    write_image(clips / "d.png", np.zeros((8, 8, 3), np.uint8))
    (clips / "empty.mp4").unlink()
    index(clips, output)
    assert InProcessPool.opened == ["d.png", "new.mp4", "words.mp4"]
    manifest = Manifest.read(output)
    assert [manifest.path(row) for row in range(4)] == ["b.mp4", "d.png", "new.mp4", "sub/c.mp4"]
    assert manifest.column("height")[1] == 8


def test_nothing_usable(index: Index, tmp_path: Path) -> None:
    with pytest.raises(KinemaError, match="does not exist"):
        index(tmp_path / "gone", tmp_path / "m.csv")
    (tmp_path / "bad").mkdir()
    with pytest.raises(KinemaError, match="no video or image"):
        index(tmp_path / "bad", tmp_path / "m.csv")
    (tmp_path / "bad/a.mp4").touch()
    with pytest.raises(KinemaError, match=r"none of its 1 files can be used \(empty 1\)"):
        index(tmp_path / "bad", tmp_path / "m.csv")
    assert not (tmp_path / "m.csv").exists()
    assert lines(tmp_path / "m.csv.report.jsonl")[0]["reason"] == "empty"
    with pytest.raises(KinemaError, match="is not a folder"):
        index(tmp_path / "bad/a.mp4", tmp_path / "m.csv")
    with pytest.raises(KinemaError, match=r"ends in \.csv or \.parquet"):
        index(tmp_path / "bad", tmp_path / "m.json")


def test_captions_are_not_overwritten(index: Index, clips: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("path,text,licence\na.mp4,a cat,CC0\n")
    with pytest.raises(KinemaError, match="would replace the captions"):
        index(clips, captions, captions=captions)
    assert "CC0" in captions.read_text()


def test_a_video_without_frame_rate_is_refused(
    index: Index, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(path: str) -> MediaInfo:
        size = os.stat(path).st_size
        return MediaInfo("video", 2, 8, 8, 0.0, 0.0, "raw", 0, False, size)

    monkeypatch.setattr(index_module, "probe", probe)
    with pytest.raises(KinemaError, match=r"\(no_frame_rate 6\)"):
        index(clips, clips / "m.csv")
