"""Runs one after the other in one folder: what changed is found anew, and the rest stays true."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from kinema.config.errors import KinemaError
from kinema.curation.alone import Alone
from kinema.curation.config import (
    CurateRecipe,
    CutConfig,
    DedupConfig,
    FilterConfig,
    FramesConfig,
    HashConfig,
    MotionConfig,
    OcrConfig,
    QualityConfig,
    ScenesConfig,
)
from kinema.curation.frames import read_strip
from kinema.curation.local import LocalExecutor
from kinema.curation.merge_rows import put_back
from kinema.curation.pipeline import Outcome, curate
from kinema.data.manifest import Manifest
from kinema.media.probe import probe
from kinema.media.read import read_frames
from tests.unit.curation.look.scene_footage import scene
from tests.unit.media.clips import write_clip

Run = Callable[..., list[dict[str, Any]]]
CUT = {"preset": "ultrafast"}


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    executor = LocalExecutor(1, gpus=0)
    yield executor
    executor.close()


def recipe(**more: Any) -> CurateRecipe:
    """Scenes and cuts only, where `more` does not say otherwise."""
    base: dict[str, Any] = {
        "scenes": ScenesConfig(min_s=0.5), "motion": None, "quality": None, "hashes": None,
        "dedup": None, "cut": CutConfig(preset="ultrafast"),
    }  # fmt: skip
    return CurateRecipe(**{**base, **more})


class Runner:
    """Curation into one folder; `rows` of its manifest, each file held against its row."""

    def __init__(self, out: Path, executor: LocalExecutor) -> None:
        self.out = out
        self.executor = executor
        self.said: list[str] = []
        self.outcome: Outcome

    def __call__(self, *inputs: Path, captions: Path | None = None, **more: Any) -> list[Any]:
        self.outcome = curate(
            [str(path) for path in inputs], str(self.out), recipe(**more),
            executor=self.executor, say=self.said.append,
            captions=None if captions is None else str(captions),
        )  # fmt: skip
        manifest = Manifest.read(self.out / "manifest.parquet")
        rows: list[Any] = pa_parquet.read_table(self.out / "manifest.parquet").to_pylist()
        for number, row in enumerate(rows):
            if not row.setdefault("dropped_by", ""):
                info = probe(manifest.absolute_path(number))
                for name in ("num_frames", "height", "width", "file_size"):
                    assert row[name] == getattr(info, name), name
                strip = read_strip(self.out / row["frames"], row["frames_count"])
                assert strip[0].shape[:2] == (row["height"], row["width"])
                first = read_frames(manifest.absolute_path(number), [info.num_frames // 6])[0]
                if row["frames_count"] == 3:
                    assert np.abs(strip[0].astype(int) - first).mean() < 12
        return rows

    @property
    def computed(self) -> dict[str, int]:
        return {stage.name: stage.computed for stage in self.outcome.summary.stages}


@pytest.fixture
def run(tmp_path: Path, executor: LocalExecutor) -> Runner:
    return Runner(tmp_path / "set", executor)


def film(path: Path, *seeds: int, frames: int = 25, **options: Any) -> Path:
    """Shots of a second each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shots = np.concatenate([scene(seed, frames, speed=2.0) for seed in seeds])
    return write_clip(path, shots, crf="20", preset="ultrafast", **options)


def test_settings_that_are_changed_and_changed_back(tmp_path: Path, run: Runner) -> None:
    raw = film(tmp_path / "raw/a.mp4", 1, 2)
    settings: list[dict[str, Any]] = [
        {},
        {"cut": CutConfig(max_side=48, **CUT)},
        {"frames": FramesConfig(count=5)},
        {"cut": CutConfig(mode="copy")},
        {"scenes": ScenesConfig(min_s=0.5, max_s=0.6)},
    ]
    first = [run(raw, **more) for more in settings]
    assert [len(rows) for rows in first] == [2, 2, 2, 2, 4]
    assert [rows[0]["height"] for rows in first] == [90, 48, 90, 90, 90]
    assert [rows[0]["frames_count"] for rows in first] == [3, 3, 5, 3, 3]
    for more, rows in zip(settings, first, strict=True):
        assert run(raw, **more) == rows  # and each file still is what its row says
        assert set(run.computed.values()) == {0}


def test_lost_clips_strips_and_signals_are_made_again(tmp_path: Path, run: Runner) -> None:
    raw = film(tmp_path / "raw/a.mp4", 1, 2)
    rows = run(raw)
    (run.out / rows[0]["path"]).unlink()
    (run.out / rows[1]["frames"]).unlink()
    shutil.rmtree(run.out / "signals")
    assert run(raw) == rows
    assert run.computed == {"look": 0, "segment": 0, "cut": 2}
    assert len(run(raw, scenes=ScenesConfig(min_s=0.5, max_s=0.6))) == 4
    assert run.computed["look"] == 1


def test_a_lost_clip_that_a_rule_drops(tmp_path: Path, run: Runner) -> None:
    raw = tmp_path / "raw"
    film(raw / "a.mp4", 1)
    film(raw / "b.mp4", 2, frames=50)
    (run.out / run(raw)[0]["path"]).unlink()
    rows = run(raw, filter=FilterConfig(rules=("duration >= 1.5",)))
    assert [row["dropped_by"] for row in rows] == ["not cut: duration >= 1.5", ""]
    assert run.computed["cut"] == 0


def test_a_source_that_was_replaced(tmp_path: Path, run: Runner) -> None:
    raw = film(tmp_path / "raw/a.mkv", 1, 2)
    before = run(raw)
    size = raw.stat().st_size
    film(raw, 3, 4)
    content = raw.read_bytes()
    raw.write_bytes((content + bytes(size))[: max(size, len(content))])
    after = run(raw)
    assert run.computed["look"] == 1
    assert {r["path"] for r in before}.isdisjoint(r["path"] for r in after)
    assert len(list((run.out / "signals").rglob("*.scenes-*.npz"))) == 2  # it may come back


def test_a_source_that_was_moved_or_touched(tmp_path: Path, run: Runner) -> None:
    raw = tmp_path / "one/raw"
    film(raw / "a.mp4", 1, 2)
    film(raw / "b.mp4", 3)
    keep = {"cut": CutConfig(whole="keep", **CUT)}
    run(raw, **keep)
    (tmp_path / "two").mkdir()
    moved = raw.rename(tmp_path / "two/raw")
    rows = run(moved, **keep)
    assert run.computed["look"] == 0
    assert rows[2]["cut_by"] == "kept"
    assert run(moved, **keep) == rows
    assert set(run.computed.values()) == {0}
    assert {row["source"] for row in rows} == {str(moved / "a.mp4"), str(moved / "b.mp4")}


def test_sources_of_one_name_and_size(tmp_path: Path, run: Runner) -> None:
    one = film(tmp_path / "one/raw/a.mp4", 1)
    two = tmp_path / "two/raw/a.mp4"
    two.parent.mkdir(parents=True)
    shutil.copy2(one, two)
    rows = run(one.parent, two.parent, one)
    assert len({row["id"] for row in rows}) == len({row["path"] for row in rows}) == 2
    assert any("given twice" in line for line in run.said)
    assert sorted(row["source"] for row in rows) == [str(one), str(two)]


def test_names_that_are_not_latin_share_no_file(tmp_path: Path, run: Runner) -> None:
    raw = tmp_path / "raw"
    for number, name in enumerate(("猫.mp4", "犬.mp4", "a=b c.mp4", "-x.mp4", "q\"'.mp4")):
        film(raw / name, number)
    (raw / "link.mp4").symlink_to("猫.mp4")
    rows = run(raw)
    assert len({row["path"] for row in rows}) == 6


def test_a_caption_that_changes_is_followed(tmp_path: Path, run: Runner) -> None:
    raw = tmp_path / "raw"
    film(raw / "a.mp4", 1)
    film(raw / "b.mp4", 2, 3)
    assert [row["text"] for row in run(raw)] == ["", "", ""]
    (raw / "a.txt").write_text("A wall.")
    (raw / "b.txt").write_text("Two walls.")
    assert [row["text"] for row in run(raw)] == ["A wall.", "", ""]
    assert set(run.computed.values()) == {0}
    table = tmp_path / "captions.csv"
    table.write_text("path,text\na.mp4,Another wall.\n")
    assert [row["text"] for row in run(raw, captions=table)] == ["Another wall.", "", ""]


def test_a_manifest_of_another_run(tmp_path: Path, run: Runner, executor: LocalExecutor) -> None:
    raw = tmp_path / "raw"
    film(raw / "a.mp4", 1, 2)
    film(raw / "b.mp4", 3)
    compared = {"hashes": HashConfig(), "dedup": DedupConfig()}
    run(raw, **compared)
    table = pa_parquet.read_table(run.out / "manifest.parquet")
    place = table.schema.get_field_index("duplicate_of")
    stale = pa.array(["0" * 32, "", ""], pa.large_string())
    pa_parquet.write_table(
        table.set_column(place, "duplicate_of", stale), run.out / "manifest.parquet"
    )
    shutil.rmtree(raw)
    again = Runner(tmp_path / "again", executor)
    rows = again(run.out / "manifest.parquet", **compared)
    assert [row["dropped_by"] for row in rows] == ["", "", ""]
    assert {row["source"] for row in rows} == {str(run.out / p) for p in table["path"].to_pylist()}
    assert {row["num_frames"] for row in rows} == {25}
    dropped = pa.array(["", "filter: x > 1", "no_caption"], pa.large_string())
    pa_parquet.write_table(table.append_column("dropped_by", dropped), run.out / "manifest.parquet")
    assert len(again(run.out / "manifest.parquet")) == 1


def test_cuts_that_change(tmp_path: Path, run: Runner) -> None:
    raw = film(tmp_path / "raw/a.mp4", 1, 2)

    def cuts(*given: list[Any]) -> Path:
        table = pa.table({"path": [str(raw)], "_cuts": [json.dumps(given)]})
        pa_parquet.write_table(table, tmp_path / "cuts.parquet")
        return tmp_path / "cuts.parquet"

    run(cuts([0, 1, "one"], [0.6, 1.6, "two"]))
    assert run.computed["cut"] == 2
    rows = run(cuts([0, 1, "first"], [0.0, 1.001, "the same"], [0.6, 1.6, ""], [1, 2, "last"]))
    assert [(row["start_s"], row["text"]) for row in rows] == [
        (0.0, "first"), (0.6, ""), (1.0, "last"),
    ]  # fmt: skip
    assert run.computed == {"look": 0, "segment": 1, "cut": 1}


def test_rules_are_tightened_and_loosened(tmp_path: Path, run: Runner) -> None:
    raw = tmp_path / "raw"
    film(raw / "a.mp4", 1, 2)
    film(raw / "b.mp4", 3, frames=50)

    def dropped(*rules: str, skip: bool = True) -> list[str]:
        config = FilterConfig(rules=rules, skip_dropped=skip)
        return [row["dropped_by"] for row in run(raw, filter=config, quality=QualityConfig())]

    assert dropped("duration >= 1.5") == ["not cut: duration >= 1.5"] * 2 + [""]
    assert run.computed["cut"] == 1
    assert dropped("duration < 1.5") == ["", "", "filter: duration < 1.5"]
    assert run.computed["cut"] == 2
    assert dropped("duration < 1") == ["filter: duration < 1"] * 3
    assert dropped("height < 90", "width > 0") == ["filter: height < 90"] * 3
    assert dropped("gop > 30", "height < 90", skip=False) == ["filter: gop > 30"] * 3
    assert run.computed["cut"] == 0
    assert dropped() == [""] * 3


def test_bad_sources_are_told_each_time(tmp_path: Path, run: Runner) -> None:
    raw = tmp_path / "raw"
    film(raw / "a.mp4", 1)
    whole = film(tmp_path / "b.mp4", 2).read_bytes()
    (raw / "b.mp4").write_bytes(whole[: len(whole) // 2])
    (raw / "short.mp4").write_bytes(film(tmp_path / "c.mp4", 2, frames=5).read_bytes())
    for _ in range(2):
        assert len(run(raw)) == 1
        reasons = {os.path.basename(bad["path"]): bad["reason"] for bad in run.outcome.refused}
        assert reasons == {"b.mp4": "truncated", "short.mp4": "no_clips"}
    assert run.computed["look"] == 0
    (raw / "b.mp4").write_bytes(whole)
    assert len(run(raw)) == 2
    assert run.computed["look"] == 1


def test_everything_is_found_in_any_order(
    tmp_path: Path, run: Runner, executor: LocalExecutor
) -> None:
    raw = tmp_path / "raw"
    paths = [film(raw / f"{n}.mp4", n) for n in range(3)]
    more = {"motion": MotionConfig(), "quality": QualityConfig(), "hashes": HashConfig()}
    other = Runner(tmp_path / "other", executor)
    assert run(*paths, **more) == other(*paths[::-1], **more)


def test_rules_about_scores_that_came_with_cuts(tmp_path: Path, run: Runner) -> None:
    raw = film(tmp_path / "raw/a.mp4", 1, 2)
    cuts = [
        [0, 1, "", {"fit": 0.2, "mood": "calm"}],
        [1, 2, "", {"fit": 0.7}],
        [8, 9, "", {"x": 1}],
    ]
    given = {"path": [str(raw)], "_cuts": [json.dumps(cuts)], "mine": [3]}
    pa_parquet.write_table(pa.table(given), tmp_path / "cuts.parquet")

    def dropped(*rules: str) -> list[str]:
        rows = run(tmp_path / "cuts.parquet", filter=FilterConfig(rules=rules))
        return [row["dropped_by"] for row in rows]

    assert dropped("fit >= 0.5") == ["not cut: fit >= 0.5", ""]
    assert dropped('mood == "calm"') == ["", 'filter: mood == "calm"']
    assert dropped("missing(x)", "missing(mine)") == ["", ""]  # of cuts that give no clip
    with pytest.raises(KinemaError, match="nothing gives the column 'y'"):
        dropped("y > 1")


def test_columns_of_another_type_than_a_stage_gives(tmp_path: Path, run: Runner) -> None:
    film(tmp_path / "raw/a.mp4", 1)
    film(tmp_path / "raw/b.mp4", 2)
    for name, value in (("a", "much"), ("b", 4)):
        given = {"path": [f"raw/{name}.mp4"], "sharpness": ["high"], "gop": ["?"], "mine": [value]}
        pa_parquet.write_table(pa.table(given), tmp_path / f"{name}.parquet")
    rows = run(tmp_path / "a.parquet", tmp_path / "b.parquet", quality=QualityConfig())
    assert all(isinstance(row["sharpness"], float) for row in rows)
    assert [(row["mine"], row["gop"]) for row in rows] == [("much", 25), ("4", 25)]


def test_what_was_there_stays_where_nothing_was_found() -> None:
    table = pa.table({"a": [1, 2, 3], "b": ["x", "y", "z"], "c": ["1.5", "2", None]})
    some = pa.table({"a": [None, 10], "c": pa.array([None, 0.5]), "d": ["new", None]})
    found = put_back(table, some, np.array([2, 0]))
    assert found.to_pydict() == {
        "a": [10, 2, 3], "b": ["x", "y", "z"], "c": [0.5, 2.0, None], "d": [None, None, "new"],
    }  # fmt: skip
    words = put_back(pa.table({"c": ["low", "2"]}), pa.table({"c": [0.5]}), np.array([1]))
    assert words["c"].to_pylist() == [None, 0.5]


def test_one_stage_alone_over_a_manifest_of_a_run(
    tmp_path: Path, run: Runner, executor: LocalExecutor
) -> None:
    raw = film(tmp_path / "raw/a.mp4", 1, 2)
    rows = run(raw)
    before = {path: path.read_bytes() for path in (run.out / "clips").rglob("*.mp4")}
    alone = Alone(
        str(run.out / "more.parquet"),
        recipe(scenes=None, quality=QualityConfig(), hashes=HashConfig()),
        executor,
    )
    alone.columns(str(run.out / "manifest.parquet"), str(run.out / "more.parquet"))
    found = pa_parquet.read_table(run.out / "more.parquet")
    assert alone.bad == []
    assert found.column("path").to_pylist() == [row["path"] for row in rows]
    assert found.column("sharpness").null_count == 0
    assert {path: path.read_bytes() for path in (run.out / "clips").rglob("*.mp4")} == before


def test_nothing_is_left_out_early_where_that_is_asked(tmp_path: Path, run: Runner) -> None:
    raw = film(tmp_path / "raw/a.mp4", 1)
    config = FilterConfig(rules=("duration > 5", "gop > 99"), skip_dropped=False)
    (row,) = run(raw, filter=config)
    assert row["dropped_by"] == "filter: duration > 5"
    assert row["cut_by"] == "encode"


def test_a_clip_that_is_dropped_is_nobodys_original(tmp_path: Path, run: Runner) -> None:
    raw = tmp_path / "raw"
    shots = scene(1, 25, 96, 160, speed=2.0)
    raw.mkdir()
    write_clip(raw / "large.mp4", shots.repeat(2, 1).repeat(2, 2), crf="12")
    write_clip(raw / "small.mp4", shots, crf="12")
    compared = {"hashes": HashConfig(), "dedup": DedupConfig()}
    rule = 'duplicate_of == ""'
    assert [row["dropped_by"] for row in run(raw, **compared)] == ["", f"filter: {rule}"]
    rows = run(raw, **compared, filter=FilterConfig(rules=("width < 300",)))
    assert [row["dropped_by"] for row in rows] == ["filter: width < 300", ""]
    assert [row["duplicate_of"] for row in rows] == ["", ""]


def test_rules_are_about_clips_as_they_will_be(tmp_path: Path, run: Runner) -> None:
    raw = film(tmp_path / "raw/a.mp4", 1)
    small: dict[str, Any] = {"cut": CutConfig(max_side=48, **CUT)}
    (row,) = run(raw, **small, filter=FilterConfig(rules=("height > 48",)))
    assert row["dropped_by"] == "not cut: height > 48"
    (row,) = run(raw, **small, filter=FilterConfig(rules=("height <= 48",)))
    assert row["dropped_by"] == ""


def test_rows_of_one_bad_file_are_all_marked(tmp_path: Path, executor: LocalExecutor) -> None:
    film(tmp_path / "a.mp4", 1)
    (tmp_path / "b.mp4").write_text("no video")
    given = {
        "path": ["b.mp4", "a.mp4", "b.mp4"], "text": ["x", "y", "z"], "num_frames": [25] * 3,
        "height": [90] * 3, "width": [160] * 3, "fps": [25.0] * 3,
    }  # fmt: skip
    Manifest.from_columns(given, tmp_path).write(tmp_path / "m.parquet")
    alone = Alone(str(tmp_path / "n.parquet"), recipe(scenes=None, hashes=HashConfig()), executor)
    found = alone.columns(str(tmp_path / "m.parquet"), str(tmp_path / "n.parquet"))
    assert found.kept.tolist() == [False, True, False]


@pytest.mark.parametrize("path", ["../a.mp4", "b/../../a.mp4", "", None])
def test_paths_of_tables_stay_below_their_folder(tmp_path: Path, run: Runner, path: Any) -> None:
    table = pa.table({"path": pa.array([path], pa.string())})
    pa_parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(KinemaError, match="is empty or leaves the folder"):
        run(tmp_path / "m.parquet")


def test_one_stage_alone_writes_no_clips(tmp_path: Path, executor: LocalExecutor) -> None:
    film(tmp_path / "a.mp4", 1, frames=6)
    given = {"path": ["a.mp4"], "text": ["x"], "num_frames": [6], "height": [90], "width": [160],
             "fps": [25.0]}  # fmt: skip
    Manifest.from_columns(given, tmp_path).write(tmp_path / "m.parquet")
    out = tmp_path / "n.parquet"
    alone = Alone(str(out), recipe(scenes=None, ocr=OcrConfig()), executor)
    found = alone.columns(str(tmp_path / "m.parquet"), str(out))
    assert found.column("ocr_boxes").tolist() == [0]
    assert list((tmp_path / "n.parquet.curation/frames").rglob("*.jpg"))
    assert not (tmp_path / "n.parquet.curation/clips").exists()
