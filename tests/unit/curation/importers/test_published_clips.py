"""Data sets of clips, in their makers' layouts, to manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kinema.config.errors import KinemaError
from kinema.curation.importers.dataset import Request
from kinema.curation.importers.run import ImportReport, import_data
from kinema.data.manifest import Manifest
from tests.unit.curation.importers import published


def run(name: str, root: Path, *sources: Path, videos: Path | None = None, **options: Any) -> Any:
    """The report and the manifest's rows."""
    output = root / "manifest.parquet"
    report = import_data(name, Request(sources, videos), output, workers=1, **options)
    assert report.kind == "clips"
    return report, Manifest.read(output).table.to_pylist()


def counts(report: ImportReport) -> dict[str, int]:
    lines = [json.loads(line) for line in report.report.read_text().splitlines()]
    assert len(lines) == sum(report.findings.counts().values())
    assert all(set(line) == {"path", "reason", "message"} for line in lines)
    return report.findings.counts()


def test_openvid(tmp_path: Path, clips: list[Path]) -> None:
    table = published.openvid(tmp_path, clips)
    report, rows = run("openvid-1m", tmp_path, table, videos=tmp_path / "video_folder")
    assert counts(report) == {"no_file": 1, "repeated": 1, "no_row": 1}
    assert [row["path"] for row in rows] == [
        "video_folder/IIvwqskxtdE_0.mp4",
        "video_folder/part2/-0UNhDLgp7o_14_0to149.mp4",
    ]
    first, second = rows
    assert first["text"] == published.TIDY
    # The table says 9 frames of 1.1 s; the file has 8.
    assert (first["num_frames"], first["height"], first["width"], first["fps"]) == (8, 48, 64, 8.0)
    assert first["duration"] == 1.0
    assert (first["aesthetic"], first["openvid_motion"]) == (5.25, 7.5)
    assert (first["openvid_consistency"], first["camera_motion"]) == (0.98, "pan_left")
    assert second["openvid_motion"] is None
    assert [row["source"] for row in rows] == ["IIvwqskxtdE", "-0UNhDLgp7o"]


def test_openvid_and_openvid_hd_name_the_same_clips_once(tmp_path: Path, clips: list[Path]) -> None:
    table = published.openvid(tmp_path, clips)
    hd = tmp_path / "OpenVidHD.csv"
    hd.write_bytes(table.read_bytes())
    report, rows = run("openvid", tmp_path, table, hd, videos=tmp_path / "video_folder")
    assert len(rows) == 2
    assert counts(report)["repeated"] == 4


def test_a_number_that_is_none_is_left_empty_and_told(tmp_path: Path, clips: list[Path]) -> None:
    published.put(clips[0], tmp_path / "a_1.mp4")
    row = ("a_1.mp4", "x", "5,3", "1", "1", "static", 8, 8, 1)
    table = published.write_csv(tmp_path / "OpenVid-1M.csv", published.OPENVID, [row])
    report, rows = run("openvid-1m", tmp_path, table)
    assert rows[0]["aesthetic"] is None
    assert counts(report)["bad_number"] == 1


def test_miradata_clips(tmp_path: Path, clips: list[Path]) -> None:
    table = published.miradata(tmp_path, clips)
    report, rows = run("miradata", tmp_path, table, videos=tmp_path / "miradata")
    assert counts(report) == {"no_file": 1}
    assert [row["text"] for row in rows] == ["Dense of 12.0.", "Dense of 12.1."]
    assert [row["source"] for row in rows] == ["abc-DEF_123"] * 2
    assert {key: rows[0][key] for key in rows[0] if key.startswith("text_")} == {
        "text_short": "short 12.0",
        "text_main_object": "A dog.",
        "text_background": "Hills.",
        "text_style": "Film.",
        "text_camera": "Still.",
    }
    assert rows[1]["width"] == 80


def test_another_caption_of_miradata(tmp_path: Path, clips: list[Path]) -> None:
    table = published.miradata(tmp_path, clips)
    request = Request((table,), tmp_path / "miradata", text_column="short_caption")
    import_data("miradata", request, tmp_path / "m.parquet", workers=1)
    row = Manifest.read(tmp_path / "m.parquet").table.to_pylist()[0]
    assert (row["text"], row["text_dense"]) == ("short 12.0", "Dense of 12.0.")


def test_sizes_from_the_table_open_no_file(tmp_path: Path, clips: list[Path]) -> None:
    table = published.miradata(tmp_path, clips)
    clip = tmp_path / "miradata" / "clip_video" / "000000000000" / "12.0.mp4"
    clip.unlink()
    clip.write_bytes(b"not looked into")
    _, rows = run("miradata", tmp_path, table, videos=tmp_path / "miradata", trust_table=True)
    assert [(row["num_frames"], row["height"], row["width"]) for row in rows] == [
        (8, 48, 64),
        (9, 48, 80),
    ]
    assert rows[0]["file_size"] == len(b"not looked into")
    table = published.openvid(tmp_path, clips)
    with pytest.raises(KinemaError, match="does not say height, width"):
        run("openvid-1m", tmp_path, table, videos=tmp_path / "video_folder", trust_table=True)


def test_pexels_paths_are_those_of_the_makers(tmp_path: Path, clips: list[Path]) -> None:
    table = published.pexels(tmp_path, clips)
    _, rows = run("pexels-45k", tmp_path, table, videos=tmp_path / "pexels_45k")
    assert rows[0]["path"] == "pexels_45k/popular_3/853857_scene-0_cut-border.mp4"
    assert rows[0]["text"] == published.TIDY
    assert [row["source"] for row in rows] == ["853857", "853858"]
    assert rows[1]["num_frames"] == 9


def test_webvid(tmp_path: Path, clips: list[Path]) -> None:
    table = published.webvid(tmp_path, clips)
    report, rows = run("webvid-10m", tmp_path, table, videos=tmp_path / "data")
    assert counts(report) == {"no_name": 1}
    assert rows[0]["path"] == "data/videos/006001_006050/1066674784.mp4"
    assert rows[0]["text"] == published.TIDY


def test_mixkit_with_and_without_captions(tmp_path: Path, clips: list[Path]) -> None:
    table = published.mixkit(tmp_path, clips)
    report, rows = run("mixkit", tmp_path, table, videos=tmp_path / "mixkit")
    assert counts(report) == {"no_row": 1}
    assert [(row["text"], row["category"]) for row in rows] == [(published.TIDY, "Airplane")]
    _, rows = run("mixkit", tmp_path, tmp_path / "mixkit")
    assert [row["text"] for row in rows] == ["plane over clouds", "waves at dusk"]


def test_vidprom_has_a_row_per_video(tmp_path: Path, clips: list[Path]) -> None:
    report, rows = run("vidprom", tmp_path, published.vidprom(tmp_path, clips), videos=tmp_path)
    assert counts(report) == {"no_file": 1}
    assert [(row["model"], row["text"]) for row in rows] == [
        ("pika", published.TIDY),
        ("t2vz", published.TIDY),
    ]
    assert rows[0]["vidprom_toxicity"] == 0.00129
    assert rows[0]["source"] == rows[1]["source"]


def test_ucf_101(tmp_path: Path, clips: list[Path]) -> None:
    folder = published.ucf_101(tmp_path, clips)
    _, rows = run("ucf-101", tmp_path, folder)
    assert [row["text"] for row in rows] == ["apply eye makeup", "yo yo", "yo yo"]
    assert [row["source"] for row in rows][1:] == ["v_YoYo_g01"] * 2
    lists = tmp_path / "ucfTrainTestlist"
    train, test = lists / "trainlist01.txt", lists / "testlist01.txt"
    report, rows = run("ucf-101", tmp_path, folder, train, test)
    assert [(row["class"], row["split"]) for row in rows] == [
        ("ApplyEyeMakeup", "train"),
        ("YoYo", "test"),
    ]
    assert counts(report) == {"no_file": 1, "no_row": 1}


def test_inter4k(tmp_path: Path, clips: list[Path]) -> None:
    folder = published.inter4k(tmp_path, clips)
    report, rows = run("inter4k", tmp_path, folder)
    assert [row["variant"] for row in rows] == ["60fps/UHD"] * 2
    assert report.text_column is None
    (tmp_path / "some.txt").write_text("2.mp4\n7.mp4\n")
    report, rows = run("inter4k", tmp_path, folder, tmp_path / "some.txt")
    assert [row["source"] for row in rows] == ["2"]
    assert counts(report) == {"no_file": 1, "no_row": 1}


def test_what_pandas_downloader_wrote(tmp_path: Path, clips: list[Path]) -> None:
    _, rows = run("panda-70m", tmp_path, published.panda_downloaded(tmp_path, clips))
    assert [row["text"] for row in rows] == ["Caption 0.", "Caption 1."]
    assert [row["panda_matching"] for row in rows] == [0.5, 1.5]
    assert [row["source"] for row in rows] == ["-2yHu5qgTzM"] * 2


def test_internvid_clips_that_were_cut(tmp_path: Path, clips: list[Path]) -> None:
    table = published.internvid(tmp_path, clips, cut=True)
    _, rows = run("internvid", tmp_path, table, videos=tmp_path / "videos")
    assert [(row["aesthetic"], row["umt_score"]) for row in rows] == [(4.5, 0.41), (3.75, 0.3)]
    assert rows[0]["source"] == "AbcDEF-_123"


def test_a_broken_file_costs_its_row(tmp_path: Path, clips: list[Path]) -> None:
    table = published.openvid(tmp_path, clips)
    clip = tmp_path / "video_folder" / "IIvwqskxtdE_0.mp4"
    clip.unlink()
    clip.write_bytes(b"")
    report, rows = run("openvid-1m", tmp_path, table, videos=tmp_path / "video_folder")
    assert len(rows) == 1
    assert counts(report)["empty"] == 1


def test_rows_without_a_caption_do_not_train(tmp_path: Path, clips: list[Path]) -> None:
    for number in (0, 1):
        published.put(clips[number], tmp_path / f"{number}.mp4")
    table = published.write_csv(
        tmp_path / "t.csv", ("path", "text"), [("0.mp4", " \n "), ("1.mp4", "x")]
    )
    report, rows = run("csv", tmp_path, table)
    assert [row["dropped_by"] for row in rows] == ["no_caption", ""]
    assert counts(report) == {"no_caption": 1}


def test_no_file_is_looked_into_twice(tmp_path: Path, clips: list[Path]) -> None:
    table = published.openvid(tmp_path, clips)
    videos = tmp_path / "video_folder"
    first, rows = run("openvid-1m", tmp_path, table, videos=videos)
    second, again = run("openvid-1m", tmp_path, table, videos=videos)
    assert (first.reused, second.reused) == (0, 2)
    assert again == rows
