"""Lists of parts of long videos, in their makers' layouts, to cut lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from kinema.config.errors import KinemaError
from kinema.curation.importers.columns import text_array
from kinema.curation.importers.cut_list import cut_table, read_cut_list, write_cut_list
from kinema.curation.importers.dataset import Request
from kinema.curation.importers.nested import narration_text
from kinema.curation.importers.run import import_data
from tests.unit.curation.importers import published


def run(name: str, root: Path, *sources: Path, videos: Path, **options: Any) -> Any:
    """The report, and `{path below root: cuts}`."""
    output = root / "cuts.parquet"
    report = import_data(name, Request(sources, videos), output, workers=1, **options)
    assert report.kind == "cuts"
    rows = read_cut_list(output).to_pylist()
    return report, {
        str(Path(row["path"]).relative_to(root)): row["_cuts"] and json.loads(row["_cuts"])
        for row in rows
    }


def test_panda(tmp_path: Path, clips: list[Path]) -> None:
    table = published.panda(tmp_path, clips)
    report, cuts = run("panda-70m", tmp_path, table, videos=tmp_path / "videos")
    assert cuts == {
        "videos/-2yHu5qgTzM.mp4": [
            [0.125, 0.375, "A woman, talking.",
             {"panda_matching": 0.4990234375, "panda_filtering": "desirable"}],
            [0.5, 0.88, "It's a \"neuron\".",
             {"panda_matching": 0.451416015625, "panda_filtering": "1_still_foreground_image"}],
        ]
    }  # fmt: skip
    assert report.findings.counts() == {"bad_row": 1, "bad_time": 1, "no_file": 1, "no_row": 1}
    assert (report.rows, report.videos) == (2, 1)


def test_miradata_of_whole_videos(tmp_path: Path, clips: list[Path]) -> None:
    table = published.miradata(tmp_path, clips, raw=True)
    report, cuts = run("miradata", tmp_path, table, videos=tmp_path / "miradata")
    [found] = cuts.values()
    assert [cut[:3] for cut in found] == [
        [0.125, 0.5, "Dense of 12.0."],
        [0.5, 0.75, "Dense of 12.1."],
    ]
    assert found[0][3]["text_short"] == "short 12.0"
    assert report.findings.counts() == {"bad_time": 1}


@pytest.mark.parametrize(
    ("spans", "whole", "expected"),
    [
        (True, True, [[0.25, 0.75, "A harbour."], [0.75, 1.25, "A ship."]]),
        (False, False, [[0, 0.5, "A harbour."], [0.5, 1, "A ship."]]),
        (True, False, [[0, 0.5, "A harbour."], [0.5, 1, "A ship."]]),
    ],
)
def test_hd_vg_counts_frames_of_its_clips(
    tmp_path: Path, clips: list[Path], spans: bool, whole: bool, expected: list[Any]
) -> None:
    table = published.hd_vg(tmp_path, clips, spans=spans, whole_videos=whole)
    _, cuts = run("hd-vg-130m", tmp_path, table, videos=tmp_path / "videos")
    assert list(cuts.values()) == [expected]


def test_hd_vg_as_json_lines(tmp_path: Path, clips: list[Path]) -> None:
    table = published.hd_vg(tmp_path, clips, spans=True, whole_videos=True)
    [(video, item)] = json.loads(table.read_text()).items()
    lines = tmp_path / "hdvg.jsonl"
    lines.write_text(json.dumps({"video_id": video, **item}) + "\n{broken\n")
    report, cuts = run("hd-vg-130m", tmp_path, lines, videos=tmp_path / "videos")
    assert len(cuts["videos/QMi8x8o55Ns.mp4"]) == 2
    assert report.findings.counts() == {"bad_row": 1}


def test_internvid(tmp_path: Path, clips: list[Path]) -> None:
    table = published.internvid(tmp_path, clips)
    _, cuts = run("internvid", tmp_path, table, videos=tmp_path / "videos")
    assert cuts == {
        "videos/AbcDEF-_123.mp4": [
            [0.125, 0.625, "a man is cooking", {"aesthetic": 4.5, "umt_score": 0.41}],
            [0.625, 0.875, "a pan", {"aesthetic": 3.75, "umt_score": 0.3}],
        ]
    }


def test_whole_videos_beside_cut_clips(tmp_path: Path, clips: list[Path]) -> None:
    """What more rows have is taken; --as takes the other."""
    table = published.internvid(tmp_path, clips[:1], cut=True)
    published.put(clips[0], tmp_path / "videos" / "AbcDEF-_123.mp4")
    report, cuts = run("internvid", tmp_path, table, videos=tmp_path / "videos")
    assert len(cuts["videos/AbcDEF-_123.mp4"]) == 2
    assert "1 rows also have a clip that is cut already" in report.notes[0]
    request = Request((table,), tmp_path / "videos")
    other = import_data("internvid", request, tmp_path / "m.parquet", prefer="clips", workers=1)
    assert (other.kind, other.rows) == ("clips", 1)


def test_ego4d(tmp_path: Path, clips: list[Path]) -> None:
    narration, manifest = published.ego4d(tmp_path, clips)
    videos = tmp_path / "v2" / "full_scale"
    _, cuts = run("ego4d", tmp_path, narration, manifest, videos=videos)
    [found] = cuts.values()
    assert found == [
        [0.25, 5, "the camera wearer picks up a cup", {"scenarios": "Cooking, Eating"}],
        [5, 15, "man X waves something", {"scenarios": "Cooking, Eating"}],
        [60, 63.5, "the camera wearer walks", {"scenarios": "Cooking, Eating"}],
    ]
    _, cuts = run("ego4d", tmp_path, manifest, videos=videos)
    assert list(cuts.values()) == [None]


@pytest.mark.parametrize(
    ("published_text", "ours"),
    [
        ("#C C lifts a #unsure off it.", "the camera wearer lifts a something off it"),
        ("#O a woman Y laughs", "a woman Y laughs"),
        ("C looks around", "the camera wearer looks around"),
        ("", ""),
    ],
)  # fmt: skip
def test_narrations_in_words(published_text: str, ours: str) -> None:
    assert narration_text(published_text) == ours


def test_opendv(tmp_path: Path, clips: list[Path]) -> None:
    sheet, language = published.opendv(tmp_path, clips)
    videos = tmp_path / "videos"
    report, cuts = run("opendv", tmp_path, sheet, language, videos=videos)
    assert report.findings.counts() == {"bad_row": 1}
    labels = {"split": "train", "area": "Arab Republic of Egypt"}
    # 90 s are discarded; pictures 5..44 of ten a second are 0.5 to 4.5 s after them.
    assert cuts == {
        "videos/J_Utah/--I-TdCe2_g.mp4": [
            [90.5, 94.5, "a street", {"command": "turning left", **labels}]
        ]
    }
    _, cuts = run("opendv", tmp_path, sheet, videos=videos)
    pieces = cuts["videos/J_Utah/--I-TdCe2_g.mp4"]  # of 43:47 without 90 s and 30 s
    assert len(pieces) == 251
    assert pieces[0][:3] == [90, pytest.approx(90 + 2507 / 251, abs=1e-3), ""]
    assert pieces[-1][1] == 2597
    with pytest.raises(KinemaError, match="list of videos is missing"):
        run("opendv", tmp_path, language, videos=videos)


def test_text_survives_as_json(tmp_path: Path) -> None:
    table = cut_table(
        text_array(["b.mp4", "a.mp4", "b.mp4"]),
        np.array([2.0, 0.0, 1.0]),
        np.array([3.0, 1.0, 2.0]),
        text_array([published.HOSTILE, "\x00\x07bell", ""]),
        {"score": pa.array([0.5, float("nan"), None]), "label": text_array(['"', "\\", "x"])},
    )
    write_cut_list(tmp_path / "sub" / "cuts.parquet", table, data_root=tmp_path / "sub" / "deep")
    rows = read_cut_list(tmp_path / "sub" / "cuts.parquet").to_pylist()
    assert [row["path"] for row in rows] == [
        str(tmp_path / "sub" / "deep" / name) for name in ("b.mp4", "a.mp4")
    ]
    assert json.loads(rows[0]["_cuts"]) == [
        [1, 2, "", {"score": None, "label": "x"}],
        [2, 3, published.TIDY, {"score": 0.5, "label": '"'}],
    ]
    assert json.loads(rows[1]["_cuts"]) == [[0, 1, "bell", {"score": None, "label": "\\"}]]


def test_a_table_that_is_no_cut_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pa_parquet.write_table(pa.table({"path": ["a"]}), path)
    with pytest.raises(KinemaError, match="no column '_cuts'"):
        read_cut_list(path)
    pa_parquet.write_table(pa.table({"path": ["../a"], "_cuts": ["[]"]}), path)
    with pytest.raises(KinemaError, match="leaves the cut list's folder"):
        read_cut_list(path)
    with pytest.raises(KinemaError, match=r"ends in \.parquet"):
        write_cut_list(tmp_path / "t.csv", pa.table({}), data_root=tmp_path)
