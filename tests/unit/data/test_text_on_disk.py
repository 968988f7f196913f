"""Text of large manifests: left on disk, and the same as if it had been read."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from kinema.data import text_on_disk
from kinema.data.manifest import Manifest, ManifestError
from kinema.data.plan import make_plan
from tests.unit.data.clip_tables import order_of

ROWS = 300


def write(file: Path, /, rows: int = ROWS, **changes: list[str | None]) -> Path:
    columns = {
        "path": [f"clips/{i:04}.mp4" for i in range(rows)],
        "text": [None if i == 7 else "  " if i == 8 else f"caption {i} é" for i in range(rows)],
        "num_frames": np.full(rows, 60),
        "height": np.full(rows, 1080),
        "width": np.full(rows, 1920),
        "fps": np.full(rows, 24.0),
        "source": [None if i == 9 else f"film {i // 10}" for i in range(rows)],
        "dropped_by": ["blur" if i == 3 else "" for i in range(rows)],
    }
    table = pa.table(columns | changes)
    pa_parquet.write_table(table, file, row_group_size=100, compression="none")
    return file


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_on_disk, "LARGE_ROWS", 100)
    monkeypatch.setattr(text_on_disk, "BATCH_ROWS", 64)


def folder_of(path: Path) -> Path:
    return path.parent / f".{path.name}.text"


def test_as_if_it_had_been_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clips.parquet")
    held = Manifest.read(path)
    assert not folder_of(path).exists()
    monkeypatch.setattr(text_on_disk, "LARGE_ROWS", 100)
    monkeypatch.setattr(text_on_disk, "BATCH_ROWS", 64)
    left = Manifest.read(path)
    assert not left.text_was_read
    assert left.path(299) == "clips/0299.mp4"
    assert left.text_was_read
    assert left.table.column_names == held.table.column_names
    assert left.table.to_pydict() == held.table.to_pydict()
    assert left.fingerprint == held.fingerprint
    assert np.flatnonzero(left.blank).tolist() == np.flatnonzero(held.blank).tolist() == [7, 8]
    assert [left.text(row) for row in (6, 7, 200)] == ["caption 6 é", "", "caption 200 é"]
    left.write(tmp_path / "again.csv")
    assert Manifest.read(tmp_path / "again.csv").fingerprint == held.fingerprint


@pytest.mark.usefixtures("small_batches")
def test_planning_looks_at_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "clips.parquet")
    clips = Manifest.read(path)
    plan = make_plan(clips, order_of(clips, 1, 2), tokens=lambda bucket: 1)
    assert plan.samples > 0
    assert plan.dropped["dropped by blur"] == 1
    assert any("captions are not looked at" in note for note in plan.notes)
    assert not clips.text_was_read
    assert not folder_of(path).exists()
    with pytest.raises(ManifestError, match="'source' holds text"):
        clips.column("source")


@pytest.mark.usefixtures("small_batches")
def test_wrong_paths_are_named_by_row_and_nothing_is_kept(tmp_path: Path) -> None:
    paths: list[str | None] = [f"{i}.mp4" for i in range(ROWS)]
    paths[170] = "../outside.mp4"
    path = write(tmp_path / "clips.parquet", path=paths)
    for _ in range(2):
        with pytest.raises(ManifestError, match=r"leaves the data folder .*row 170"):
            Manifest.read(path).path(0)
    assert sorted(p.name for p in folder_of(path).iterdir()) == ["lock"]


@pytest.mark.usefixtures("small_batches")
def test_a_changed_file_is_put_on_disk_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "clips.parquet")
    first = Manifest.read(path)
    assert first.text(5) == "caption 5 é"
    made = (folder_of(path) / "text.arrow").stat().st_mtime_ns
    assert Manifest.read(path).text(5) == "caption 5 é"
    assert (folder_of(path) / "text.arrow").stat().st_mtime_ns == made
    size = path.stat().st_size
    other = [None if i == 7 else "  " if i == 8 else f"CAPTION {i} é" for i in range(ROWS)]
    write(path, text=other)
    assert path.stat().st_size == size  # the time alone tells
    os.utime(path, ns=(1, 1))  # another one, whatever the clock's steps
    again = Manifest.read(path)
    assert again.text(5) == "CAPTION 5 é"
    assert again.fingerprint != first.fingerprint
    assert first.text(6) == "caption 6 é"  # who has the old file open goes on reading it


@pytest.mark.usefixtures("small_batches")
def test_writing_that_was_broken_off_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "clips.parquet")
    assert Manifest.read(path).text(5) == "caption 5 é"
    first, stat = path.read_bytes(), path.stat()
    write(path, text=["new"] * ROWS)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            Manifest.read(path).text(5)
    path.write_bytes(first)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Manifest.read(path).text(5) == "caption 5 é"


def test_a_hash_does_not_depend_on_chunks() -> None:
    column = pa.array(["a", "bc", "", "def", "g"], pa.large_string())
    whole, cut, moved = (text_on_disk.TextDigest() for _ in range(3))
    whole.update(column)
    for first, count in ((0, 2), (2, 0), (2, 1), (3, 2)):
        cut.update(column.slice(first, count))
    assert cut.hexdigest() == whole.hexdigest()
    moved.update(pa.array(["a", "b", "c", "def", "g"], pa.large_string()))
    assert moved.hexdigest() != whole.hexdigest()


@pytest.mark.usefixtures("small_batches")
def test_many_ask_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clips.parquet")
    written = []
    write_once = text_on_disk._write

    def counted(*args: object) -> dict[str, str]:
        written.append(1)
        time.sleep(0.3)  # for the others to come
        return write_once(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(text_on_disk, "_write", counted)
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda row: Manifest.read(path).text(row), range(10, 18)))
    assert texts == [f"caption {row} é" for row in range(10, 18)]
    assert len(written) == 1


@pytest.mark.usefixtures("small_batches")
def test_what_is_there_is_read_from_a_read_only_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "clips.parquet")
    assert Manifest.read(path).text(1) == "caption 1 é"

    def refused(folder: Path) -> None:
        raise OSError(errno.EROFS, "read-only", str(folder))

    monkeypatch.setattr(text_on_disk, "_lock", refused)
    assert Manifest.read(path).text(1) == "caption 1 é"


@pytest.mark.usefixtures("small_batches")
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clips.parquet")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert Manifest.read(path).text(1) == "caption 1 é"
    assert not folder_of(path).exists()
    assert len(list((tmp_path / "cache").rglob("text.arrow"))) == 1
