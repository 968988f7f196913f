"""Archives, Hugging Face folders, tables of any columns; and files of the wrong data set."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from kinema.config.errors import KinemaError
from kinema.curation.importers.archives import safe_member
from kinema.curation.importers.catalog import DATA_SETS, data_set, looks_like
from kinema.curation.importers.dataset import Request
from kinema.curation.importers.run import import_data
from kinema.curation.importers.video_folder import VideoFolder
from kinema.data.manifest import Manifest
from tests.unit.curation.importers import published


def run(name: str, root: Path, *sources: Path, **request: Any) -> Any:
    output = root / "manifest.parquet"
    report = import_data(name, Request(sources, **request), output, workers=1)
    return report, Manifest.read(output).table.to_pylist()


def test_tars_are_extracted_below_their_folder(tmp_path: Path, clips: list[Path]) -> None:
    root = tmp_path / "work"
    folder = published.webdataset(root, clips)
    report, rows = run("webdataset", root, folder, extract=root / "extracted")
    assert [(row["path"], row["text"]) for row in rows] == [
        ("extracted/00000/a.mp4", published.TIDY),
        ("extracted/00001/sub/a.mp4", "two"),
    ]
    assert [row["score"] for row in rows] == [1.5, None]
    assert report.findings.counts() == {"unsafe_member": 3}
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.mp4"))
    assert found == ["work/extracted/00000/a.mp4", "work/extracted/00001/sub/a.mp4"]


def test_tars_are_opened_once(tmp_path: Path, clips: list[Path]) -> None:
    folder = published.webdataset(tmp_path, clips)
    extract = tmp_path / "extracted"
    first = run("webdataset", tmp_path, folder, extract=extract)
    for tar in folder.iterdir():  # the same size and time, but nothing in it
        status = tar.stat()
        tar.write_bytes(b"\0" * status.st_size)
        os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = run("webdataset", tmp_path, folder, extract=extract)
    assert again[1] == first[1]
    assert again[0].findings.counts() == first[0].findings.counts()


def test_a_tar_that_is_cut_off(tmp_path: Path, clips: list[Path]) -> None:
    folder = published.webdataset(tmp_path, clips)
    tar = folder / "00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:1500])
    report, rows = run("webdataset", tmp_path, folder, extract=tmp_path / "extracted")
    assert [row["path"] for row in rows] == ["extracted/00000/a.mp4"]
    assert report.findings.counts()["truncated"] == 1
    assert not list((tmp_path / "extracted").rglob("*.tmp"))
    tar.write_bytes(data)  # downloaded again
    _, rows = run("webdataset", tmp_path, folder, extract=tmp_path / "extracted")
    assert len(rows) == 2


def test_tars_need_a_place(tmp_path: Path, clips: list[Path]) -> None:
    with pytest.raises(KinemaError, match="--extract FOLDER"):
        run("webdataset", tmp_path, published.webdataset(tmp_path, clips))


@pytest.mark.parametrize(
    "name", ["../a.mp4", "a/../../b.mp4", "/etc/x.mp4", "", "a\\..\\b.mp4", "a\x00.mp4", "."]
)
def test_members_that_leave_the_folder(name: str) -> None:
    assert safe_member(name) is None


def test_hugging_face_folder(tmp_path: Path, clips: list[Path]) -> None:
    folder = published.hugging_face(tmp_path, clips)
    report, rows = run("hugging-face", tmp_path, folder)
    assert [(row["path"], row["text"], row["split"]) for row in rows] == [
        ("hf/test/2.mp4", "b", "test"),
        ("hf/train/videos/1.mp4", published.TIDY, "train"),
    ]
    assert report.findings.counts() == {"unsafe_path": 1}


def test_videos_inside_parquet(tmp_path: Path, clips: list[Path]) -> None:
    videos = [
        {"bytes": clips[0].read_bytes(), "path": "../../x.mp4"},
        {"bytes": clips[1].read_bytes(), "path": None},
        {"bytes": None, "path": None},
    ]
    table = pa.table({"video": videos, "caption": ["one", "two", "three"]})
    path = tmp_path / "train-00000-of-00001.parquet"
    pa_parquet.write_table(table, path)
    report, rows = run("hugging-face", tmp_path, path, extract=tmp_path / "out")
    below = "out/train-00000-of-00001"
    assert [row["path"] for row in rows] == [f"{below}/000000_x.mp4", f"{below}/000001.mp4"]
    assert [row["text"] for row in rows] == ["one", "two"]
    assert report.rows == 2


def test_any_table(tmp_path: Path, clips: list[Path]) -> None:
    table = published.any_table(tmp_path, clips)
    report, found = run("csv", tmp_path, table, text_column="Beschreibung")
    assert [row["text"] for row in found] == [published.TIDY, "other ending"]
    assert [row["my_score"] for row in found] == [3.5, None]
    assert [row["my_label_2"] for row in found] == ["A", "B"]
    assert report.findings.counts() == {"unsafe_path": 1, "no_file": 1}
    assert "'Video_Path' taken" in report.notes[0]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_separators(tmp_path: Path, clips: list[Path], separator: str) -> None:
    published.put(clips[0], tmp_path / "1.mp4")
    (tmp_path / "t.csv").write_text(f"path{separator}text\n1.mp4{separator}a, b\n")
    _, rows = run("csv", tmp_path, tmp_path / "t.csv")
    assert rows[0]["text"] == "a, b"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252", "utf-16"])
def test_encodings(tmp_path: Path, clips: list[Path], encoding: str) -> None:
    published.put(clips[0], tmp_path / "1.mp4")
    table = tmp_path / "t.csv"
    published.write_csv(table, ("path", "text"), [("1.mp4", "naïve café")], encoding)
    if encoding != "utf-8-sig":
        with pytest.raises(KinemaError, match="--encoding"):
            run("csv", tmp_path, table)
    said = "utf-8" if encoding == "utf-8-sig" else encoding
    _, rows = run("csv", tmp_path, table, encoding=said)
    assert rows[0]["text"] == "naïve café"


def test_absolute_paths_and_json(tmp_path: Path, clips: list[Path]) -> None:
    data = [{"video": str(clip), "prompt": clip.stem, "nested": {"a": 1}} for clip in clips]
    table = published.write_json(tmp_path / "list.json", data)
    _, rows = run("csv", tmp_path, table)
    assert [row["path"] for row in rows] == [str(clip) for clip in clips]


def test_compressed_tables_and_long_numbers(tmp_path: Path, clips: list[Path]) -> None:
    number = 9_007_199_254_740_993  # the first that a real number cannot hold
    published.put(clips[0], tmp_path / f"{number}.mp4")
    line = json.dumps({"id": number, "text": "x", "score": 1})
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write(line + "\n{broken\n")
    report, rows = run("csv", tmp_path, tmp_path / "t.jsonl.gz")
    assert rows[0]["path"] == f"{number}.mp4"
    assert report.findings.counts() == {"bad_row": 1}
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write(f"id,text\n{number},from CSV\n")
    _, rows = run("csv", tmp_path, tmp_path / "t.csv.gz")
    assert rows[0]["text"] == "from CSV"


def find(folder: Path, *keys: str, unique_names: bool = False) -> list[str]:
    """The file of each key; `?`: it could mean several; `!`: it leaves the folder."""
    videos = VideoFolder(folder)
    match = videos.find(pa.array(list(keys)), unique_names=unique_names)
    return [
        "!" if unsafe else "?" if ambiguous else videos.files[file] if file >= 0 else ""
        for file, unsafe, ambiguous in zip(match.files, match.unsafe, match.ambiguous, strict=True)
    ]


def test_which_file_a_name_means(tmp_path: Path) -> None:
    root = tmp_path / "v"
    for name in ("a/1.mp4", "b/1.mp4", "2.mp4", "c/3.webm", "c/4.mp4", "c/4.mkv", "d/5.mp4"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    # As it is, without leading folders, with another ending or none, from another system.
    keys = ("a/1.mp4", "/data/x/b/1.mp4", "./2.mp4", "c/3.mp4", "c/3")
    assert find(root, *keys) == ["a/1.mp4", "b/1.mp4", "2.mp4", "c/3.webm", "c/3.webm"]
    assert find(root, "x\\b\\1", "a\\1.mp4") == ["b/1.mp4", "a/1.mp4"]
    assert find(tmp_path, "b/1.mp4", "d/5") == [
        "v/b/1.mp4",
        "v/d/5.mp4",
    ]
    # By name in any folder, if the key has none and one file only has it.
    assert find(root, "5.mp4", "1.mp4", "c/4") == ["d/5.mp4", "?", "?"]
    # A key with folders means those.
    assert find(root, "x/5.mp4", "b/5.mp4") == ["", ""]
    assert find(root, "x/5.mp4", "1", unique_names=True) == ["d/5.mp4", "a/1.mp4"]
    # Two keys, one file: neither is sure, but for the one that names it exactly.
    assert find(root, "x/2.mp4", "y/2.mp4", "x/2.mp4") == ["?", "?", "?"]
    assert find(root, "2.mp4", "y/2.mp4") == ["2.mp4", "?"]
    assert find(root, "a/../2.mp4", "..", "", "a\x00") == ["!", "!", "", "!"]


def test_ambiguous_rows_are_reported(tmp_path: Path, clips: list[Path]) -> None:
    published.put(clips[0], tmp_path / "v" / "a" / "1.mp4")
    published.put(clips[1], tmp_path / "v" / "b" / "1.mp4")
    published.put(clips[2], tmp_path / "v" / "2.mp4")
    rows = [("1.mp4", "which?"), ("2.mp4", "sure")]
    table = published.write_csv(tmp_path / "t.csv", ("path", "text"), rows)
    report, found = run("csv", tmp_path, table, videos=tmp_path / "v")
    assert [row["text"] for row in found] == ["sure"]
    assert report.findings.counts()["ambiguous"] == 1


WRONG = {
    "openvid-1m": published.panda,
    "panda-70m": published.webvid,
    "webvid-10m": published.openvid,
    "ego4d": published.webvid,
    "opendv": published.openvid,
    "vidprom": published.openvid,
    "hd-vg-130m": published.openvid,
    "mixkit": published.openvid,
    "internvid": published.miradata,
    "miradata": published.internvid,
    "pexels-45k": published.vidprom,
}
LOOKS = {
    published.panda: "panda-70m",
    published.webvid: "webvid-10m",
    published.openvid: "openvid-1m",
    published.miradata: "miradata",
    published.internvid: "internvid",
    published.vidprom: "vidprom",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_of_another_data_set(tmp_path: Path, clips: list[Path], name: str) -> None:
    make = WRONG[name]
    with pytest.raises(KinemaError) as caught:
        run(name, tmp_path, make(tmp_path, clips))  # type: ignore[operator]
    assert "has no column" in caught.value.what
    assert f"kinema data import {LOOKS[make]}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("openvid", "openvid-1m"), ("OpenVid_1M", "openvid-1m"), ("hf", "hugging-face")],
)
def test_other_names(name: str, nearest: str) -> None:
    assert data_set(name).name == nearest


def test_a_wrong_name_lists_all_with_the_nearest() -> None:
    with pytest.raises(KinemaError, match="did you mean 'panda-70m'") as caught:
        data_set("panda-70")
    assert all(entry.name in str(caught.value.hint) for entry in DATA_SETS)
    assert looks_like(["a", "b"]) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"video,caption,aesthetic score,motion score\n", "has no rows"),
        (b'video,caption,aesthetic score,motion score\n"a.mp4,b,1,2\n', "never closed|no rows"),
        (b"\x00\x01\x02", "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_tables_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "OpenVid-1M.csv").write_bytes(content)
    with pytest.raises(KinemaError, match=message):
        run("openvid-1m", tmp_path, tmp_path / "OpenVid-1M.csv")


def test_sources_that_are_not_there(tmp_path: Path, clips: list[Path]) -> None:
    with pytest.raises(KinemaError, match="does not exist"):
        run("openvid-1m", tmp_path, tmp_path / "nope.csv")
    with pytest.raises(KinemaError, match="is a folder"):
        run("openvid-1m", tmp_path, tmp_path)
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(KinemaError, match=r"unzip x\.zip"):
        run("openvid-1m", tmp_path, tmp_path / "x.zip")
    table = published.openvid(tmp_path, clips)
    with pytest.raises(KinemaError, match=r"first means 'IIvwqskxtdE_0\.mp4', the folder"):
        run("openvid-1m", tmp_path, table, videos=clips[0].parent)
    with pytest.raises(KinemaError, match="would replace the table"):
        import_data("openvid-1m", Request((table,)), table)
