"""Results are there again after a run that ended well, badly, or in the middle of a write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest

from kinema.config.errors import KinemaError
from kinema.curation import store as store_module
from kinema.curation.stage import Bad, Found, Part
from kinema.curation.store import ResultStore
from kinema.media.stores import filesystem
from tests.s3_fixture import S3Store

PART = Part(
    "everything",
    {
        "whole": pa.int64(),
        "small": pa.int32(),
        "score": pa.float32(),
        "share": pa.float64(),
        "yes": pa.bool_(),
        "text": pa.string(),
        "_embedding": pa.list_(pa.float32()),
        "_boxes": pa.list_(pa.list_(pa.int32())),
    },
    {"version": 1},
)
FULL: dict[str, Any] = {
    "whole": -(1 << 40), "small": 7, "score": 0.5, "share": 0.1, "yes": False, "text": "Mond ☾\n",
    "_embedding": [0.25, -1.0], "_boxes": [[1, 2], []],
}  # fmt: skip
NONE = dict.fromkeys(FULL)
EMPTY: dict[str, Any] = NONE | {"text": "", "_embedding": [], "_boxes": []}


@pytest.fixture(scope="module")
def bucket(s3: S3Store) -> str:
    """URL of a folder in an S3 store on this machine."""
    return f"{s3.bucket('results')}/run"


@pytest.fixture(params=["disk", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store may be; nothing is there yet."""
    if request.param == "disk":
        return str(tmp_path / "stages")
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}/stages"
    pytest.importorskip("fsspec")
    return f"memory://{tmp_path.name}/stages"


def key(number: int) -> str:
    return f"{number:032x}"


def row(number: int, found: Found | None = None) -> tuple[str, str, Found]:
    return key(number), f"{number:032d}", FULL | {"whole": number} if found is None else found


def kept(store: ResultStore, part: Part = PART) -> dict[int, dict[str, Any]]:
    """All that a store knows of a part, by number."""
    known = store.known(part)
    rows = known.take(known.order).to_pylist()
    numbers = [int(one.decode(), 16) for one in known.keys]
    assert [row["key"] for row in rows] == [one.decode() for one in known.keys]
    return dict(zip(numbers, rows, strict=True))


def values(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in PART.columns}


def test_results_come_back_as_they_were(base: str) -> None:
    results = [row(3, FULL), row(1, NONE), row(2, EMPTY), row(9, Bad("corrupt", "half a file"))]
    with ResultStore(base) as store:
        assert kept(store) == {}
        store.keep(PART, results[:2])
        store.keep(PART, results[2:])
        at_once = kept(store)
    with ResultStore(base) as store:
        again = kept(store)
        store.keep(PART, [row(4)])
        assert set(kept(store)) == {1, 2, 3, 4, 9}
    assert again == at_once
    assert list(again) == [1, 2, 3, 9]
    assert values(again[3]) == FULL
    assert values(again[1]) == NONE
    assert values(again[2]) == EMPTY
    assert (again[9]["reason"], again[9]["message"]) == ("corrupt", "half a file")
    assert values(again[9]) == NONE
    assert again[3]["reason"] is None
    assert again[3]["id"] == f"{3:032d}"
    with ResultStore(base) as store:
        assert set(kept(store)) == {1, 2, 3, 4, 9}


def test_rows_are_found_by_key(tmp_path: Path) -> None:
    with ResultStore(str(tmp_path)) as store:
        store.keep(PART, [row(n) for n in (5, 2, 8)])
        known = store.known(PART)
        asked = np.array([key(8), "", key(1), key(5), key(99)], "S32")
        found = known.take(known.find(asked)).column("whole").to_pylist()
    assert found == [8, None, None, 5, None]


def test_versions_of_a_part_are_kept_apart(tmp_path: Path) -> None:
    newer = Part(PART.name, PART.columns, {"version": 2})
    with ResultStore(str(tmp_path)) as store:
        store.keep(PART, [row(1)])
        store.keep(newer, [row(2)])
    with ResultStore(str(tmp_path)) as store:
        assert list(kept(store)) == [1]
        assert list(kept(store, newer)) == [2]


def test_failures_that_may_pass_are_not_kept(tmp_path: Path) -> None:
    with ResultStore(str(tmp_path)) as store:
        store.keep(PART, [row(1, Bad("no_answer", "503", passing=True)), row(2)])
        assert list(kept(store)) == [2]


def test_the_last_result_of_a_key_counts(base: str) -> None:
    with ResultStore(base) as store:
        store.keep(PART, [row(1, FULL | {"small": 1})])
        store.keep(PART, [row(1, FULL | {"small": 2})])
        assert kept(store)[1]["small"] == 2
    with ResultStore(base) as store:
        assert kept(store)[1]["small"] == 2


@pytest.mark.parametrize("found", [{"whole": "many"}, {"whole": 1, "colour": "red"}])
def test_what_is_not_of_the_part_is_a_mistake(tmp_path: Path, found: dict[str, Any]) -> None:
    with ResultStore(str(tmp_path)) as store, pytest.raises(TypeError, match="everything"):
        store.keep(PART, [row(1, found)])


def stream_of(base: Path) -> Path:
    """The file that a run under way writes."""
    (file,) = (base / PART.name / PART.key).glob("run-*.arrows")
    return file


def test_a_stream_cut_anywhere_gives_what_was_whole(tmp_path: Path) -> None:
    sizes = [0]  # of the file, after each batch
    store = ResultStore(str(tmp_path / "whole"))
    for number in range(4):
        many = [row(10 * number + place) for place in range(number + 1)]
        store.keep(PART, many)
        sizes.append(stream_of(tmp_path / "whole").stat().st_size)
    file = stream_of(tmp_path / "whole")
    whole = kept(store)
    store.close()
    assert len(whole) == 1 + 2 + 3 + 4
    assert sizes == sorted(set(sizes)), "a batch is in the file when it was kept"

    data = torn_stream(tmp_path)
    assert len(data) == sizes[-1]
    with ResultStore(str(tmp_path / "cut")) as store:
        torn = tmp_path / "cut" / PART.name / PART.key / file.name
        torn.parent.mkdir(parents=True)
        ends = {size + step for size in sizes for step in (-9, -8, -1, 0, 1, 4, 8, 9)}
        for end in sorted({*range(0, len(data), 61), *(e for e in ends if 0 <= e <= sizes[-1])}):
            torn.write_bytes(data[:end])
            found = kept(store)
            batches = sum(size <= end for size in sizes[1:])
            assert len(found) == batches * (batches + 1) // 2, f"cut at {end} of {sizes}"
            assert found == {number: whole[number] for number in found}


def torn_stream(tmp_path: Path) -> bytes:
    """The stream of the test above as a killed run leaves it: without an end."""
    store = ResultStore(str(tmp_path / "again"))
    for number in range(4):
        store.keep(PART, [row(10 * number + place) for place in range(number + 1)])
    data = stream_of(tmp_path / "again").read_bytes()
    store.close()
    return data


def test_a_killed_run_loses_nothing_that_it_kept(tmp_path: Path) -> None:
    script = f"""
        import os, signal, sys
        sys.path[:] = {sys.path!r}
        from tests.unit.curation.test_store import PART, ResultStore, row
        store = ResultStore({str(tmp_path)!r})
        for number in range(50):
            store.keep(PART, [row(number)])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == -9
    with ResultStore(str(tmp_path)) as store:
        assert list(kept(store)) == list(range(50))
        store.keep(PART, [row(50)])
    with ResultStore(str(tmp_path)) as store:
        assert list(kept(store)) == list(range(51))


def test_runs_that_ended_leave_one_file(tmp_path: Path) -> None:
    folder = tmp_path / PART.name / PART.key
    for run in range(3):
        with ResultStore(str(tmp_path)) as store:
            store.keep(PART, [row(run)])
        assert [file.name for file in folder.iterdir()] == ["results.parquet"]
    store = ResultStore(str(tmp_path))
    store.keep(PART, [row(3)])
    store.__exit__(RuntimeError, RuntimeError("a run that ends badly"), None)
    assert len(list(folder.iterdir())) == 2
    torn = folder / "run-torn.arrows"
    torn.write_bytes(torn_stream(tmp_path)[:-100])
    with ResultStore(str(tmp_path)) as store:
        store.keep(PART, [row(4)])
    assert [file.name for file in folder.iterdir()] == ["results.parquet"]
    with ResultStore(str(tmp_path)) as store:
        assert set(kept(store)) == {0, 1, 2, 3, 4, 10, 11, 20, 21, 22}


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "stages"
    with ResultStore(str(folder)) as store:
        store.keep(PART, [row(1)])
        with pytest.raises(KinemaError, match="another curation run") as caught:
            ResultStore(str(folder))
        assert caught.value.where == str(tmp_path / "out")
        assert list(kept(store)) == [1], "the first run goes on"
    ResultStore(str(folder)).close()


@pytest.mark.parametrize("text", [json.dumps({"kinema_curation_results": 99}), "{", "[]"])
def test_results_of_another_version_are_refused(tmp_path: Path, text: str) -> None:
    ResultStore(str(tmp_path)).close()
    (tmp_path / "format.json").write_text(text)
    with pytest.raises(KinemaError, match="another version") as caught:
        ResultStore(str(tmp_path))
    assert caught.value.where == str(tmp_path)
    (tmp_path / "format.json").unlink()
    ResultStore(str(tmp_path)).close()  # the lock was given back


@pytest.mark.parametrize("damage", ["cut", "text", "columns"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    with ResultStore(str(tmp_path)) as store:
        store.keep(PART, [row(1)])
    file = tmp_path / PART.name / PART.key / "results.parquet"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "text":
        file.write_text("no parquet")
    else:
        pa_parquet.write_table(pa.table({"key": ["a"]}), file)
    with ResultStore(str(tmp_path)) as store:
        with pytest.raises(KinemaError, match="is damaged") as caught:
            store.known(PART)
        assert caught.value.where == str(file)
        assert "delete this file" in str(caught.value)
        file.unlink()
        assert kept(store) == {}


def test_a_stream_of_other_columns_is_named(tmp_path: Path) -> None:
    other = Part("other", {"whole": pa.int32()}, {})
    store = ResultStore(str(tmp_path / "other"))
    store.keep(other, [(key(1), "1", {"whole": 1})])
    (file,) = (tmp_path / "other").glob("other/*/run-*.arrows")
    folder = tmp_path / "here" / PART.name / PART.key
    folder.mkdir(parents=True)
    (folder / "run-x.arrows").write_bytes(file.read_bytes())
    store.close()
    with ResultStore(str(tmp_path / "here")) as store:
        with pytest.raises(KinemaError, match="other columns") as caught:
            store.known(PART)
        assert caught.value.where == str(folder / "run-x.arrows")


def test_a_folder_that_cannot_be_made_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((KinemaError, OSError)) as caught:
        ResultStore(str(tmp_path / "file" / "stages"))
    assert str(tmp_path / "file") in str(caught.value)


def test_a_store_gets_files_as_the_run_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the end: there a killed run loses the last seconds only."""
    pytest.importorskip("fsspec")
    monkeypatch.setattr(store_module, "UPLOAD_S", 0.0)
    base = f"memory://{tmp_path.name}"
    store = ResultStore(base)
    for number in range(3):
        store.keep(PART, [row(number)])
    system, path = filesystem(f"{base}/{PART.name}/{PART.key}")
    files = system.find(path)
    assert len(files) == 3
    with ResultStore(base) as other:  # as the next run, after this one was killed
        assert list(kept(other)) == [0, 1, 2]
    assert os.path.basename(files[0]).startswith("part-")
