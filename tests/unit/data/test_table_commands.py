"""`kinema data filter`, `merge`, `split`, `stats` and `explain` as a person runs them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from typer.testing import CliRunner

from kinema.cli.main import app
from kinema.config.errors import KinemaError
from kinema.data import table_file
from kinema.data.manifest import Manifest
from kinema.data.merge import merge_files
from kinema.data.split import place_of, split_file
from kinema.data.stats import histogram, number_column, shape_of, stats_of
from kinema.data.stats_text import bar, render_stats, short
from kinema.data.table_file import TableFile, written
from kinema.data.tables import write_table


def run(*words: object, fails: bool = False) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code != 0) == fails, result.output
    return result.stdout


def clips(count: int, first: int = 0) -> pa.Table:
    """Clips of 4 s, three of each source."""
    number = np.arange(first, first + count)
    return pa.table(
        {
            "path": [f"clips/{i}.mp4" for i in number],
            "text": [["a red cat", "", "the dog walks slowly by"][i % 3] for i in number],
            "num_frames": np.full(count, 96),
            "height": np.where(number % 4 == 0, 1280, 720),
            "width": np.where(number % 4 == 0, 720, 1280),
            "fps": np.full(count, 24.0),
            "source": [f"/raw/{i // 3}.mp4" for i in number],
            "aesthetic": pa.array(
                [None if i % 10 == 9 else 4 + i % 10 / 4 for i in number], pa.float32()
            ),
            "camera_motion": [["pan_left", "static"][i % 2] for i in number],
            "dropped_by": ["check:truncated" if i == first else "" for i in number],
        }
    )


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "m.parquet"
    write_table(clips(60), path)
    return path


# filter, and what explain says of it


def test_filter_then_explain(manifest: Path) -> None:
    output = manifest.with_name("good.csv")
    text = run("filter", manifest, "aesthetic >= 5", "not blank(text)", "-o", output)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:2] == ["rule", "drops"]
    assert lines[1] == ["aesthetic", ">=", "5", "29", "19", "29", "6"]
    assert lines[2] == ["not", "blank(text)", "10", "10", "20", "0"]
    assert "dropped before, and not by a filter: 1 check:truncated" in text
    assert "20 of 60 clips are kept (33.3%)" in text
    found = Manifest.read(output)
    assert found.dropped() == {
        "filter: aesthetic >= 5": 29, "filter: not blank(text)": 10, "check:truncated": 1,
    }  # fmt: skip

    text = run("explain", "2", "--manifest", output)
    assert text.splitlines() == [
        "row 2: clips/2.mp4",
        "  dropped_by = filter: aesthetic >= 5",
        "    aesthetic = 4.5",
    ]
    assert "aesthetic = missing" in run("explain", "9", "--manifest", output)
    assert run("explain", "5", "--manifest", output).splitlines()[1] == "  not dropped"
    text = run("explain", "clips/4.mp4", "opensora-1.2/stage2", "--manifest", output)
    assert "but it never trains: the manifest says dropped_by = filter: not blank" in text
    assert '  text = ""' in text

    text = run("filter", output, "aesthetic >= 4.5", "-o", output)  # in place, looser
    assert "42 of 60" in text
    assert Manifest.read(output).dropped()["check:truncated"] == 1


def test_filter_by_preset_and_what_if(manifest: Path) -> None:
    text = run("filter", manifest, "--preset", "opensora-1.2/stage2")
    assert "not blank(text)" in text
    assert "aesthetic >= 4.5" in text
    with pytest.raises(KinemaError, match=r"no column ocr_area, .*\n.*--skip-missing"):
        run("filter", manifest, "--preset", "goku/720p")
    text = run("filter", manifest, "--preset", "goku/720p", "--skip-missing")
    assert "left out, there is no column ocr_area: ocr_area <= 0.01" in text
    text = run("filter", manifest, "--what-if", "aesthetic", "--at", "5,4.5")
    assert [line.split()[:2] for line in text.splitlines()[1:3]] == [
        ["4.5", "71.2%"], ["5", "50.8%"],
    ]  # fmt: skip
    assert "of 59 clips; 6 have no value" in text
    text = run("filter", manifest, "--what-if", "aesthetic", "--at", "5", "not blank(text)")
    assert "with the rules" in text
    assert "opensora-1.2/stage2" in run("filter", "--presets")


def test_filter_refuses(manifest: Path) -> None:
    for words, message in (
        (["astetic > 1"], "there is no column 'astetic'"),
        (["aesthetic >"], "ends too early"),
        (["--what-if", "text"], "is text, not a number"),
        (["--what-if", "aesthetic", "--at", "4,x"], "not numbers"),
        ([], "no rule is given"),
        (["aesthetic > 1", "-o", manifest.with_name("x.txt")], r"ends in \.csv or \.parquet"),
        (["false", "--remove", "-o", manifest.with_name("x.csv")], "no clip is kept"),
    ):
        with pytest.raises(KinemaError, match=message):
            run("filter", manifest, *words)
    assert not manifest.with_name("x.csv").exists()
    with pytest.raises(KinemaError, match="does not exist"):
        run("filter", manifest.with_name("none.csv"), "aesthetic > 1")
    with pytest.raises(KinemaError, match="neither a recipe nor a manifest"):
        run("explain", "1")


def test_pieces_are_one_table(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("filter", manifest, "aesthetic >= 5", "-o", manifest.with_name("a.parquet"))
    monkeypatch.setattr(table_file, "ROWS", 7)
    pieces = run("filter", manifest, "aesthetic >= 5", "-o", manifest.with_name("b.parquet"))
    assert pieces.replace("b.parquet", "a.parquet") == whole
    one, other = (TableFile(manifest.with_name(f"{n}.parquet")).read() for n in "ab")
    assert one.equals(other)
    stats = run("stats", manifest)
    monkeypatch.undo()
    assert stats == run("stats", manifest)


# merge


def test_merge_appends_rows(tmp_path: Path) -> None:
    a, b, output = tmp_path / "a/m.parquet", tmp_path / "b/m.csv", tmp_path / "all.parquet"
    write_table(clips(6), a)
    write_table(clips(4, 100).drop_columns(["aesthetic"]).append_column("extra", [["x"] * 4]), b)
    text = run("merge", a, b, "-o", output)
    assert "10 clips" in text
    found = Manifest.read(output)
    assert found.path(0) == str(tmp_path / "a/clips/0.mp4")
    assert found.path(9) == str(tmp_path / "b/clips/103.mp4")
    assert found.table["extra"].to_pylist() == [None] * 6 + ["x"] * 4
    assert np.isnan(found.column("aesthetic")[6:]).all()
    assert found.table["height"].type == pa.int64()


def test_merge_adds_columns_and_counts_what_differs(tmp_path: Path) -> None:
    a, b, output = tmp_path / "a.parquet", tmp_path / "b.csv", tmp_path / "all.csv"
    write_table(clips(5), a)
    b.write_text(
        "path,aesthetic,match,text,dropped_by\n"
        "clips/1.mp4,4.25,21.5,a caption,\n"
        "clips/1.mp4,9,9,again,\n"
        f"{tmp_path}/clips/3.mp4,7,22.5,,no_caption\n"
        "clips/9.mp4,1,1,new,\n"
    )
    text = run("merge", a, b, "-o", output, "--left")
    assert "5 clips of its own" in text
    assert (
        "b.csv: 0 clips of its own, 2 clips that a table before it has, "
        "1 clip left out (--left), 1 row left out, of clips that it has twice" in text
    )
    assert "aesthetic: 1 clip has another value, clips/3.mp4: 4.75 stays, not 7.0" in text
    assert text.count("another value") == 1
    found = TableFile(output).read()
    assert found["match"].to_pylist() == [None, 21.5, None, 22.5, None]
    assert found["aesthetic"].to_pylist()[:4] == [4.0, 4.25, 4.5, 4.75]
    assert found["text"].to_pylist()[1] == "a caption"  # it was blank there
    assert found["dropped_by"].to_pylist() == ["check:truncated", "", "", "no_caption", ""]

    result = merge_files([TableFile(a), TableFile(b)], str(output))
    assert (result.rows, result.added) == (6, {str(a): 5, str(b): 1})
    assert TableFile(output).read()["path"].to_pylist()[5] == "clips/9.mp4"


def test_merge_on_another_column_and_types_that_do_not_fit(tmp_path: Path) -> None:
    a, b, output = tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "all.parquet"
    write_table(pa.table({"id": ["x", "y"], "n": [1, 2], "t": pa.nulls(2)}), a)
    write_table(pa.table({"id": ["y", "z"], "n": [2.5, 3.0], "t": ["u", "v"]}), b)
    text = run("merge", a, b, "-o", output, "--on", "id")
    assert "n: 1 clip has another value, y: 2.0 stays, not 2.5" in text
    assert TableFile(output).read().to_pydict() == {
        "id": ["x", "y", "z"], "n": [1.0, 2.0, 3.0], "t": ["", "u", "v"],
    }  # fmt: skip
    write_table(pa.table({"id": ["y"], "n": ["two"]}), b)
    with pytest.raises(KinemaError, match=r"'n' holds \w+ in .*b.parquet and int64 in"):
        run("merge", a, b, "-o", output, "--on", "id")
    with pytest.raises(KinemaError, match="has no column 'path'"):
        run("merge", a, b, "-o", output)
    with pytest.raises(KinemaError, match="nothing to merge"):
        run("merge", a, "-o", output)
    assert TableFile(output).rows == 3  # what was there stays


# split


def test_split_by_source_and_stable_under_growth(tmp_path: Path) -> None:
    def split(count: int, share: float, order: int = 1) -> tuple[set[str], set[str]]:
        path = tmp_path / "m.parquet"
        write_table(clips(count).take(pa.array(np.arange(count)[::order])), path)
        run("split", path, "-o", tmp_path / "t.csv", "--validation", tmp_path / "v.parquet",
            "--share", share)  # fmt: skip
        sides = [TableFile(tmp_path / name).read() for name in ("t.csv", "v.parquet")]
        assert sum(side.num_rows for side in sides) == count
        assert sides[1].num_rows % 3 == 0  # all clips of a source
        train, validation = (set(side["source"].to_pylist()) for side in sides)
        return train, validation

    train, validation = split(600, 0.1)
    assert not train & validation
    assert len(train | validation) == 200
    assert 8 <= len(validation) <= 35
    assert split(600, 0.1, order=-1) == (train, validation)
    more_train, more_validation = split(1200, 0.1)
    assert validation <= more_validation
    assert train <= more_train
    assert validation < split(600, 0.3)[1]


def test_the_place_of_a_source_is_for_ever() -> None:
    assert [place_of(name) for name in ("", "a.mp4", "/raw/ü.mp4")] == PLACES
    assert place_of("a.mp4", seed=1) != place_of("a.mp4")


PLACES = [5924149483755797076, 5934010137955902500, 5976425315973566381]


def test_split_says_what_is_missing(tmp_path: Path, manifest: Path) -> None:
    train, validation = tmp_path / "t.csv", tmp_path / "v.csv"
    table = TableFile(manifest)
    text = run("split", manifest, "-o", train, "--validation", validation, "--share", 0.3)
    assert "videos" in text
    assert "hours" in text
    with pytest.raises(KinemaError, match="no column 'video'"):
        split_file(table, str(train), str(validation), 0.3, by="video")
    with pytest.raises(KinemaError, match="no clip goes into validation: 20 sources"):
        split_file(table, str(train), str(validation), 0.0)
    with pytest.raises(KinemaError, match="no clip goes into training"):
        split_file(table, str(train), str(validation), 1.0)
    assert TableFile(train).rows + TableFile(validation).rows == 60  # as it was before
    with pytest.raises(KinemaError, match="the same file"):
        run("split", manifest, "-o", train, "--validation", train)
    write_table(clips(30).set_column(6, "source", pa.array([""] * 15 + ["a"] * 15)), manifest)
    result = split_file(TableFile(manifest), str(train), str(validation), 0.3)
    assert result.without_source == 15
    assert result.train.sources + result.validation.sources == 16


# stats


def test_stats_of_known_clips(manifest: Path) -> None:
    found = stats_of(TableFile(manifest))
    assert (found.rows, found.clips) == (60, 59)
    assert found.seconds == 59 * 4
    assert found.sizes == [(1280, 720, 45, 180.0), (720, 1280, 14, 56.0)]
    assert found.shapes == [("16:9", 45), ("9:16", 14)]
    assert [column.name for column in found.numbers] == ["duration", "fps", "aesthetic"]
    aesthetic = found.numbers[2]
    assert (aesthetic.known, aesthetic.missing) == (53, 6)
    assert aesthetic.least == 4.0
    assert int(aesthetic.histogram.counts.sum()) == 53
    labels = {column.name: column.values for column in found.labels}
    assert labels["camera_motion"] == [("static", 30), ("pan_left", 29)]
    assert found.captions is not None
    assert (found.captions.blank, found.captions.words.known) == (20, 39)
    assert dict(found.captions.frequent) == {
        "cat": 19, "red": 19, "dog": 20, "walks": 20, "slowly": 20,
    }  # fmt: skip
    assert found.dropped == {"check:truncated": 1}


def test_stats_are_printed_and_drawn(manifest: Path, tmp_path: Path) -> None:
    text = run("stats", manifest, "--plot", tmp_path / "s.svg")
    assert "60 clips, 59 looked at (98.3%), 0.07 hours" in text
    assert "1280x720" in text
    assert "shapes: 16:9 76.3%, 9:16 23.7%" in text
    assert "camera_motion" in text
    assert "slowly 20" in text
    root = ET.parse(tmp_path / "s.svg").getroot()
    texts = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(t.startswith("aesthetic (median 5") for t in texts)
    boxes = list(root.iter("{http://www.w3.org/2000/svg}rect"))
    assert len(boxes) > 20
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    for box in boxes[1:]:
        assert 0 <= float(box.get("x", "-1")) <= width
        assert 0 <= float(box.get("y", "-1")) + float(box.get("height", "0")) <= height
    run("stats", manifest, "--plot", tmp_path / "s.png")
    picture = np.asarray(Image.open(tmp_path / "s.png").convert("RGB"))
    assert (picture == [0x3B, 0x7D, 0xD8]).all(-1).mean() > 0.02  # there are bars
    run("stats", manifest, "--plot", tmp_path / "s.html")
    assert (tmp_path / "s.html").read_text().startswith("<!doctype html>")
    with pytest.raises(KinemaError, match=r"ends in \.svg, \.html or \.png"):
        run("stats", manifest, "--plot", tmp_path / "s.pdf")


def test_stats_of_chosen_columns_and_clips(manifest: Path) -> None:
    text = run("stats", manifest, "height / width", "aesthetic > 5", "--where", "height > 800")
    assert "15 looked at" in text
    assert "height / width" in text
    assert "true" in text
    assert "camera_motion" not in text
    with pytest.raises(KinemaError, match="no column 'nothing'"):
        run("stats", manifest, "nothing")
    write_table(pa.table({"path": ["a"], "x": pa.nulls(1)}), manifest)
    assert "1 clip," in run("stats", manifest)


def test_bins_are_round_and_hold_everything() -> None:
    random = np.random.default_rng(1)
    for values in (
        random.normal(5, 1, 1000), random.lognormal(16, 1, 1000), random.random(50) * 1e-6,
        np.array([3.0]), np.array([0.0, 0.0]), random.integers(0, 9, 100).astype(float),
        np.array([-5.0, 5.0]),
    ):  # fmt: skip
        values = np.sort(values)
        found = histogram(values)
        assert found.counts.sum() == len(values)
        assert 1 <= len(found.counts) <= 23
        assert np.allclose(np.diff(found.edges), np.diff(found.edges)[0])
        inside = (values >= found.edges[0]) & (values < found.edges[-1])
        assert inside.mean() >= 0.98 or len(values) == 2
        count, _ = np.histogram(values[inside], found.edges)
        assert (count[1:-1] == found.counts[1:-1]).all()
    empty = number_column("x", np.array([np.nan]))
    assert (empty.known, empty.missing) == (0, 1)


def test_words_of_the_terminal() -> None:
    assert [short(n) for n in (0.0, 4.5, 12345.0, 5e7, float("nan"), -2e9)] == [
        "0", "4.5", "12.35k", "50M", "-", "-2G",
    ]  # fmt: skip
    assert bar(1.0, 4) == "████"
    assert bar(0.5, 4) == "██"
    assert bar(0.001, 4) == "▏"
    assert bar(0.0) == ""
    assert shape_of(1920, 1080) == "16:9"
    assert shape_of(608, 1080) == "9:16"
    assert shape_of(1000, 300) == "other"


def test_labels_do_not_break_the_table(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    write_table(pa.table({"path": ["a", "b"], "x[0]": [1.0, 2.0], "tag": ["[bold]", None]}), path)
    text = render_stats(stats_of(TableFile(path)), title="m")
    assert "x[0]" in text
    assert "[bold]" in text
    assert "(none)" in text


# files


def test_tables_in_a_store(manifest: Path) -> None:
    run("filter", manifest, "aesthetic >= 5", "-o", "memory://set/m.parquet")
    run("filter", "memory://set/m.parquet", "aesthetic >= 6", "-o", "memory://set/n.parquet")
    run("merge", "memory://set/m.parquet", "memory://set/n.parquet", "-o", "memory://set/o.csv")
    found = TableFile("memory://set/o.csv")
    assert found.rows == 60
    assert found.read(["path"])["path"][3].as_py() == str(manifest.parent / "clips/3.mp4")
    assert "60 clips" in run("stats", "memory://set/o.csv")
    run("split", "memory://set/n.parquet", "-o", "memory://set/t.csv", "--share", "0.3",
        "--validation", "memory://set/v.csv")  # fmt: skip


def test_what_csv_cannot_hold_is_said(tmp_path: Path) -> None:
    table = pa.table({"path": ["a"], "v": [[1.0, 2.0]]})
    write_table(table, tmp_path / "m.parquet")
    with pytest.raises(KinemaError, match=r"try: write a \.parquet"):
        run("filter", tmp_path / "m.parquet", "true", "-o", tmp_path / "m.csv")
    assert not (tmp_path / "m.csv").exists()
    run("filter", tmp_path / "m.parquet", "true", "-o", tmp_path / "n.parquet")
    assert TableFile(tmp_path / "n.parquet").read()["v"].to_pylist() == [[1.0, 2.0]]


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    table = pa.table({"path": ["a"]})
    with (
        pytest.raises(KinemaError, match="cannot be written"),
        written(tmp_path / "m.parquet", pa.schema([("path", pa.bool_())])) as writer,
    ):
        writer.write(table)
    assert list(tmp_path.iterdir()) == []
    write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "empty.parquet")
    with pytest.raises(KinemaError, match="has no rows"):
        TableFile(tmp_path / "empty.parquet")
