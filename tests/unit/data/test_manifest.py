"""The manifest: what is read, what is refused and how, what the fingerprint sees."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kinema.config.errors import KinemaError
from kinema.data.manifest import COLUMNS, Manifest, ManifestError

HEADER = "path,text,num_frames,height,width,aspect_ratio,fps,resolution,file_size\n"
GOOD = "a.mp4,a red kite,51,720,1280,0.5625,29.97,921600,1000\n"


def columns(n: int = 4) -> dict[str, Any]:
    return {
        "path": [f"clips/{i}.mp4" for i in range(n)],
        "text": [f"caption {i}" for i in range(n)],
        "num_frames": np.arange(n) + 1,
        "height": np.full(n, 720),
        "width": np.full(n, 1280),
        "fps": np.full(n, 23.976),
        "file_size": np.arange(n) * 1000,
    }


def made(tmp_path: Path, **changes: Any) -> Manifest:
    return Manifest.from_columns({**columns(), **changes}, tmp_path)


def csv(tmp_path: Path, text: str, name: str = "m.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_round_trip(tmp_path: Path, ending: str) -> None:
    texts = ['said "yes", twice\nand left', "NA", "", "a red kite ä 風"]
    manifest = made(tmp_path, text=texts, score=[0.5, None, 1.5, 2.5])
    manifest.write(tmp_path / f"m.{ending}")
    again = Manifest.read(tmp_path / f"m.{ending}")
    assert [again.text(row) for row in range(4)] == texts
    assert again.path(2) == "clips/2.mp4"
    assert again.absolute_path(2) == tmp_path / "clips/2.mp4"
    assert again.column("num_frames").tolist() == [1, 2, 3, 4]
    assert again.column("aspect_ratio").tolist() == [0.5625] * 4
    assert again.column("resolution").tolist() == [921600] * 4
    assert again.column("score").tolist()[2:] == [1.5, 2.5]
    assert np.isnan(again.column("score")[1])
    assert tuple(again.table.column_names[:9]) == COLUMNS
    assert again.fingerprint == manifest.fingerprint


rows = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
        st.text(st.characters(exclude_categories=["Cs"])),
        st.integers(1, 10**6),
        st.floats(0.01, 1000, allow_nan=False),
    ),
    min_size=1,
    max_size=8,
)


@given(rows=rows)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_csv_and_parquet_of_the_same_rows_are_the_same_data(tmp_path: Path, rows: Any) -> None:
    path, text, frames, fps = zip(*rows, strict=True)
    names = [f"/{name}" for name in path]
    size = [64] * len(rows)
    manifest = Manifest.from_columns(
        {"path": names, "text": text, "num_frames": frames, "height": size, "width": size,
         "fps": fps}, tmp_path,
    )  # fmt: skip
    manifest.write(tmp_path / "m.csv")
    manifest.write(tmp_path / "m.parquet")
    for ending in ("csv", "parquet"):
        again = Manifest.read(tmp_path / f"m.{ending}")
        assert again.fingerprint == manifest.fingerprint
        assert [again.text(row) for row in range(len(again))] == list(text)
        assert [again.path(row) for row in range(len(again))] == names


def test_fingerprint_sees_what_training_sees(tmp_path: Path) -> None:
    first = made(tmp_path).fingerprint
    assert made(tmp_path).fingerprint == first
    changed = {
        "path": [f"clips/{i}.mp4" for i in (0, 1, 3, 2)],
        "text": ["caption 0", "caption 1", "caption 2", "caption 4"],
        "num_frames": [1, 2, 3, 5],
        "height": [720, 720, 720, 721],
        "width": [1280, 1280, 1280, 1281],
        "fps": [23.976, 23.976, 23.976, 24.0],
        "dropped_by": ["", "", "", "blurry"],
    }
    prints = {made(tmp_path, **{name: values}).fingerprint for name, values in changed.items()}
    assert len(prints | {first}) == len(changed) + 1


def test_fingerprint_does_not_see_what_training_does_not_see(tmp_path: Path) -> None:
    first = made(tmp_path)
    other = made(tmp_path / "elsewhere", score=[1, 2, 3, 4], file_size=[0] * 4)
    assert other.fingerprint == first.fingerprint
    narrow = made(tmp_path, fps=np.full(4, 23.976, np.float32), height=np.full(4, 720, np.int16))
    assert narrow.fingerprint == first.fingerprint
    whole_as_real = made(tmp_path, num_frames=[1.0, 2.0, 3.0, 4.0])
    assert whole_as_real.fingerprint == first.fingerprint
    table = pa.table({k: pa.chunked_array([v[:1], v[1:]]) for k, v in columns().items()})
    assert Manifest(table, tmp_path).fingerprint == first.fingerprint
    moved = made(tmp_path, text=["caption 0c", "aption 1", "caption 2", "caption 3"])
    assert moved.fingerprint != first.fingerprint  # same bytes, other borders


def test_columns_are_views_and_read_only(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    assert np.shares_memory(manifest.column("width"), manifest.column("width"))
    with pytest.raises(ValueError, match="read-only"):
        manifest.column("width")[0] = 3
    with pytest.raises(ManifestError, match="no column 'flow'"):
        manifest.column("flow")
    with pytest.raises(ManifestError, match="'text' holds"):
        manifest.column("text")


@pytest.mark.parametrize("name", ["path", "text", "num_frames", "height", "width", "fps"])
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_missing_column_is_named_with_the_cure(tmp_path: Path, name: str, ending: str) -> None:
    whole = Manifest.read(csv(tmp_path, HEADER + GOOD))
    table = whole.table.drop_columns([name, "dropped_by"])
    path = tmp_path / f"less.{ending}"
    if ending == "csv":
        pa_csv.write_csv(table, path)
    else:
        pa_parquet.write_table(table, path)
    with pytest.raises(KinemaError) as error:
        Manifest.read(path)
    assert str(path) in str(error.value)
    assert f"'{name}'" in str(error.value)
    assert "kinema data index" in str(error.value)


def test_what_can_be_worked_out_may_be_missing(tmp_path: Path) -> None:
    path = csv(tmp_path, "path,text,num_frames,height,width,fps\na.mp4,kite,51,720,1280,30\n")
    manifest = Manifest.read(path)
    assert manifest.column("aspect_ratio").tolist() == [720 / 1280]
    assert manifest.column("resolution").tolist() == [720 * 1280]
    assert "file_size" not in manifest.table.column_names


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.mp4,kite,,720,1280,0.5625,30,921600,1", "'num_frames'.*row 1"),
        ("a.mp4,kite,nan,720,1280,0.5625,30,921600,1", "'num_frames'.*row 1"),
        ("a.mp4,kite,1.5,720,1280,0.5625,30,921600,1", "'num_frames'.*row 1 has 1.5"),
        ("a.mp4,kite,51,0,1280,0.5625,30,921600,1", "'height'.*row 1 has 0"),
        ("a.mp4,kite,51,720,-3,0.5625,30,921600,1", "'width'.*row 1 has -3"),
        ("a.mp4,kite,51,720,inf,0.5625,30,921600,1", "'width'.*row 1"),
        ("a.mp4,kite,51,720,1280,0.5625,0,921600,1", "'fps'.*row 1"),
        ("a.mp4,kite,51,720,1280,0.5625,,921600,1", "'fps'.*row 1"),
        ("a.mp4,kite,51,720,1280,1.7778,30,921600,1", "'aspect_ratio' is not height / width"),
        ("a.mp4,kite,many,720,1280,0.5625,30,921600,1", "many"),
        (",kite,51,720,1280,0.5625,30,921600,1", "'path' is empty: row 1"),
        ("../a.mp4,kite,51,720,1280,0.5625,30,921600,1", r"leaves the data folder.*row 1"),
        ("b/../../a.mp4,kite,51,720,1280,0.5625,30,921600,1", r"leaves the data folder"),
        ("a.mp4,kite,51,720", "(?i)expected 9 columns, got 4"),
    ],
)
def test_bad_rows_are_refused_by_number(tmp_path: Path, row: str, message: str) -> None:
    path = csv(tmp_path, f"{HEADER}{GOOD}{row}\n")
    with pytest.raises(KinemaError, match=message) as error:
        Manifest.read(path)
    assert str(path) in str(error.value)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="rows 0, 1, 2, 3, 4 and 15 more"):
        Manifest.from_columns({**columns(20), "height": np.zeros(20)}, tmp_path)


def test_paths_stay_below_the_root_or_are_absolute(tmp_path: Path) -> None:
    names = ["/elsewhere/a.mp4", "a/../b.mp4", "..a/b..mp4", "a/..b/c.mp4"]
    manifest = made(tmp_path, path=names)
    assert manifest.absolute_path(0) == Path("/elsewhere/a.mp4")
    assert manifest.absolute_path(2) == tmp_path / "..a/b..mp4"


def test_root_does_not_move_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv(tmp_path, HEADER + GOOD)
    monkeypatch.chdir(tmp_path)
    manifest = Manifest.read("m.csv")
    monkeypatch.chdir("/")
    assert manifest.absolute_path(0) == tmp_path / "a.mp4"


def test_data_root(tmp_path: Path) -> None:
    manifest = Manifest.read(csv(tmp_path, HEADER + GOOD), data_root=tmp_path / "videos")
    assert manifest.absolute_path(0) == tmp_path / "videos/a.mp4"


def test_writing_elsewhere_keeps_pointing_at_the_clips(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    (tmp_path / "other").mkdir()
    manifest.write(tmp_path / "other/m.csv")
    assert Manifest.read(tmp_path / "other/m.csv").absolute_path(1) == tmp_path / "clips/1.mp4"
    manifest.write(tmp_path / "other/n.csv", data_root=tmp_path)
    assert Manifest.read(tmp_path / "other/n.csv", data_root=tmp_path).path(1) == "clips/1.mp4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.txt", b"path,text\n", "ends in .csv or .parquet"),
        ("m", b"path,text\n", "ends in .csv or .parquet"),
        ("m.csv", b"", "empty"),
        ("m.parquet", b"", "empty"),
        ("m.csv", HEADER.encode(), "no rows"),
        ("m.parquet", b"path,text\na,b\n", "not a readable Parquet file"),
        ("m.parquet", b"PAR1" + bytes(100) + b"PAR1", "not a readable Parquet file"),
        ("m.csv", b"path,path,text\na,b,c\n", "'path' is there twice"),
        ("m.csv", HEADER.encode() + b"\xff\xfe" + GOOD.encode(), "(?i)utf-?8"),
        ("m.csv", b"\x00\x01\x02\xff" * 100, "m.csv"),
        ("m.csv", "path,text\na.mp4,café\n".encode("latin-1"), "save it as UTF-8"),
        ("m.csv", b"path;text\na.mp4;a red, round one\n", "separated by semicolons"),
        ("m.csv", b"path\ttext\r\na.mp4\ta\r\n", "separated by tabs"),
        (
            "m.csv",
            b"path,text\na.mp4,a,b\x1b[31m\n",
            r"Expected 2 columns, got 3: a.mp4,a,b\?\[31m",
        ),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KinemaError, match=message):
        Manifest.read(tmp_path / name)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(KinemaError, match="does not exist"):
        Manifest.read(tmp_path / "m.csv")
    (tmp_path / "m.parquet").mkdir()
    with pytest.raises(KinemaError, match="is a folder, not a table"):
        Manifest.read(tmp_path / "m.parquet")


def test_wrong_types_in_parquet(tmp_path: Path) -> None:
    for name, values, message in [
        ("num_frames", ["a", "b", "c", "d"], "'num_frames' holds string, not numbers"),
        ("text", [1, 2, 3, 4], "'text' holds int64, not text"),
        ("height", [True] * 4, "'height' holds bool"),
    ]:
        with pytest.raises(ManifestError, match=message):
            made(tmp_path, **{name: values})
    encoded = pa.array(columns()["text"]).dictionary_encode()
    assert made(tmp_path, text=encoded).text(3) == "caption 3"


def test_byte_order_mark_and_folder_names_like_columns(tmp_path: Path) -> None:
    folder = tmp_path / "height=3"
    folder.mkdir()
    (folder / "m.csv").write_text("\ufeff" + HEADER + GOOD, encoding="utf-8")
    manifest = Manifest.read(folder / "m.csv")
    assert manifest.path(0) == "a.mp4"
    manifest.write(folder / "m.parquet")
    assert Manifest.read(folder / "m.parquet").column("height").tolist() == [720]


def test_images_have_no_frame_rate(tmp_path: Path) -> None:
    manifest = Manifest.read(csv(tmp_path, HEADER + "a.png,kite,1,64,64,1,,4096,5\n"))
    assert np.isnan(manifest.column("fps")[0])
    manifest.write(tmp_path / "n.parquet")
    assert Manifest.read(tmp_path / "n.parquet").fingerprint == manifest.fingerprint


def test_captions_are_required_only_of_kept_rows(tmp_path: Path) -> None:
    text = ["one", "", " \t", "four"]
    manifest = made(tmp_path, text=text)
    with pytest.raises(ManifestError, match="2 of 4 clips have no caption: rows 1, 2"):
        manifest.require_captions()
    made(tmp_path, text=text, dropped_by=["", "x", "x", ""]).require_captions()
    made(tmp_path).require_captions()


def test_dropped_rows_are_kept_in_the_file_and_not_checked(tmp_path: Path) -> None:
    manifest = made(tmp_path, dropped_by=["", "dark", None, "dark"], height=[720, 0, 720, None])
    assert manifest.kept.tolist() == [True, False, True, False]
    assert manifest.dropped() == {"dark": 2}
    again = manifest.with_dropped({0: "blurry", 1: "blurry"})
    assert again.dropped() == {"dark": 2, "blurry": 1}
    again.write(tmp_path / "m.csv")
    assert Manifest.read(tmp_path / "m.csv").dropped() == {"dark": 2, "blurry": 1}


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = csv(tmp_path, HEADER + GOOD)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KinemaError, match=r"(?s)m\.csv: cannot be written: No space.*free"):
        made(tmp_path).write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.csv"]


def test_what_csv_cannot_hold_is_told(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "path": ["a.mp4"], "text": ["a"], "num_frames": [9], "height": [8], "width": [8],
        "fps": [8.0], "boxes": [[1, 2]],
    }  # fmt: skip
    clips = Manifest.from_columns(columns, tmp_path)
    with pytest.raises(KinemaError, match="no form in CSV"):
        clips.write(tmp_path / "m.csv")
    assert not list(tmp_path.iterdir())
    clips.write(tmp_path / "m.parquet")
    with pytest.raises(KinemaError, match="whole numbers of at least 1: row 0"):
        Manifest.from_columns(columns | {"num_frames": [2**62]}, tmp_path)
