"""Finding media below a folder, captions for it, and the journal of an index run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kinema.config.errors import KinemaError
from kinema.data.captions import find_captions
from kinema.data.find_media import find_media
from kinema.data.journal import Journal


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_media_is_found_by_name_in_sorted_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a/z.PNG", "a.webm", "notes.txt", "c/d/e.mkv", ".hidden.mp4")
    touch(tmp_path, ".cache/x.mp4", "folder.mp4/inside.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    files, refused = find_media(tmp_path)
    assert files == [
        "a.webm", "a/z.PNG", "b.mp4", "c/d/e.mkv", "folder.mp4", "folder.mp4/inside.mp4",
        "pipe.mp4",
    ]  # fmt: skip
    assert refused == []


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.mp4", "videos/b.mp4")
    (tmp_path / "videos/loop").symlink_to(tmp_path / "videos")
    (tmp_path / "videos/up").symlink_to(tmp_path)
    (tmp_path / "videos/linked").symlink_to(tmp_path / "real")
    files, _ = find_media(tmp_path / "videos")
    assert len([f for f in files if f.endswith("a.mp4")]) == 1
    assert len([f for f in files if f.endswith("b.mp4")]) == 1


def test_names_that_are_not_text_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    with open(os.fsencode(tmp_path) + b"/\xff.mp4", "wb"):
        pass
    files, refused = find_media(tmp_path)
    assert files == ["a.mp4"]
    assert [(r.path, r.reason) for r in refused] == [("\\udcff.mp4", "bad_name")]


def write_captions(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("header", ["path,text,licence", "video,caption,licence"])
def test_captions_from_a_table(tmp_path: Path, header: str) -> None:
    table = write_captions(
        tmp_path / "c.csv",
        f'{header}\na.mp4,"  one,\n two ",x\n./sub/b.mp4,123,x\ngone.mp4,three,x\na.mp4,four,x\n'
        f"{tmp_path}/in/c.mp4,NA,x\nd.mp4,,x\n",
    )
    files = ["a.mp4", "c.mp4", "d.mp4", "sub/b.mp4"]
    found = find_captions(tmp_path / "in", files, table, tmp_path / "in")
    assert found.texts == {"a.mp4": "one, two", "sub/b.mp4": "123", "c.mp4": "NA", "d.mp4": ""}
    assert [(r.path, r.reason) for r in found.unused] == [
        ("gone.mp4", "caption_without_file"),
        ("a.mp4", "caption_repeated"),
    ]


def test_captions_relative_to_other_folders(tmp_path: Path) -> None:
    folder = tmp_path / "data/set/clips"
    table = write_captions(tmp_path / "c.csv", "path,text\nset/clips/a.mp4,one\n")
    assert find_captions(folder, ["a.mp4"], table, tmp_path / "data").texts == {"a.mp4": "one"}
    beside = write_captions(tmp_path / "d.csv", "path,text\ndata/set/clips/a.mp4,two\n")
    assert find_captions(folder, ["a.mp4"], beside, Path("/")).texts == {"a.mp4": "two"}


def test_captions_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    table = write_captions(tmp_path / "c.csv", "path,text\nx/a.mp4,one\n")
    with pytest.raises(KinemaError, match=r"(?s)none of its 1 paths.*'x/a.mp4'.*--data-root"):
        find_captions(tmp_path, ["a.mp4"], table, tmp_path)
    with pytest.raises(KinemaError, match="no column 'path' or 'video'"):
        find_captions(tmp_path, ["a.mp4"], write_captions(table, "file,text\na,b\n"), tmp_path)
    with pytest.raises(KinemaError, match="no column 'text' or 'caption'"):
        find_captions(tmp_path, ["a.mp4"], write_captions(table, "path,words\na,b\n"), tmp_path)


def test_captions_from_text_files_beside_the_clips(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4")
    (tmp_path / "a.txt").write_text("\ufeffa red\nkite \n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.txt").write_bytes(b"x" * 70_000)
    os.mkfifo(tmp_path / "d.txt")  # would hang a careless reader
    files = [f"{name}.mp4" for name in "abcde"]
    found = find_captions(tmp_path, files, None, tmp_path)
    assert found.texts == {"a.mp4": "a red kite"}
    assert [(r.path, r.reason) for r in found.unused] == [
        ("b.txt", "caption_unreadable"),
        ("c.txt", "caption_unreadable"),
    ]
    assert find_captions(tmp_path, ["e.mp4"], None, tmp_path).source == "none"


def test_journal_remembers_unchanged_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    status = {name: os.stat(tmp_path / name) for name in ("a.mp4", "b.mp4", "c.mp4")}
    with Journal(tmp_path / "j") as journal:
        assert journal.recall("a.mp4", status["a.mp4"]) is None
        journal.add("a.mp4", status["a.mp4"], width=3)
        journal.add("b.mp4", status["b.mp4"], refused=["corrupt", "damaged"])
        journal.add("c.mp4", status["c.mp4"], width=4)
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"path": "c.mp4", "wid')  # killed here
    os.utime(tmp_path / "c.mp4", ns=(1, 1))
    for _ in range(2):
        with Journal(tmp_path / "j") as journal:
            found = journal.recall("a.mp4", status["a.mp4"])
            assert found is not None
            assert found["width"] == 3
            refused = journal.recall("b.mp4", status["b.mp4"])
            assert refused is not None
            assert refused["refused"] == ["corrupt", "damaged"]
            assert journal.recall("c.mp4", os.stat(tmp_path / "c.mp4")) is None


def test_a_finished_run_has_its_refusals_tried_again(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    status = os.stat(tmp_path / "a.mp4")
    with Journal(tmp_path / "j") as journal:
        journal.add("a.mp4", status, width=3)
        journal.add("b.mp4", status, refused=["corrupt", "damaged"])
        journal.finish()
    with Journal(tmp_path / "j") as journal:
        assert journal.recall("a.mp4", status) is not None
        assert journal.recall("b.mp4", status) is None


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(KinemaError, match="another index run"):
        Journal(tmp_path / "j")
    with Journal(tmp_path / "j"):
        pass


def test_other_files_are_not_taken_for_journals(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('{"some": "json"}\n')
    with pytest.raises(KinemaError, match="not a journal of this version"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").read_text() == '{"some": "json"}\n'
    (tmp_path / "k").write_text("words\n")
    with pytest.raises(KinemaError, match="not a journal of this version"):
        Journal(tmp_path / "k")
    (tmp_path / "l").write_text('{"kinema_ind')  # killed at the first line
    with Journal(tmp_path / "l"):
        pass
