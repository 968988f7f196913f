"""Results that are files: where one is gone it is made again, and only where it is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from kinema.curation.engine import StagesReport, recall, run_stages
from kinema.curation.files import Present, new_file
from kinema.curation.local import LocalExecutor
from kinema.curation.stage import Bad, Part, Places, Result, Row, Work
from kinema.curation.store import ResultStore
from tests.unit.curation.engine_stages import asked, note, rows


@dataclass(frozen=True)
class Writes:
    """Writes the value of each row to a file, which `column` names."""

    column: str
    name: str = "writes"
    batch: int = 2
    gpu: bool = False
    threads: int = 1
    fails: bool = False

    @property
    def parts(self) -> Sequence[Part]:
        return [Part(self.name, {self.column: pa.string()}, {}, file=self.column)]

    def time_limit_s(self, row: Row) -> float:
        return 30.0

    def open(self, places: Places) -> Work:
        base = places.signals if self.column.startswith("_") else places.out

        def work(rows: Sequence[Row]) -> list[Result]:
            return [self._one(row, places, base) for row in rows]

        return work

    def _one(self, row: Row, places: Places, base: str) -> Result:
        note(Path(places.out), self.name, row)
        if self.fails:
            return {self.name: Bad("gone", "the source is gone", passing=True)}
        with new_file(f"{base}/w/{row['value']}.txt") as file:
            file.write_text(str(row["value"]))
        return {self.name: {self.column: f"w/{row['value']}.txt"}}


@dataclass(frozen=True)
class Reads:
    """Gives twice the number that is in the file of `column`."""

    column: str
    version: int = 1
    name: str = "reads"
    batch: int = 2
    gpu: bool = False
    threads: int = 1

    @property
    def parts(self) -> Sequence[Part]:
        return [Part("reads", {"twice": pa.int64()}, {"version": self.version}, (self.column,))]

    def time_limit_s(self, row: Row) -> float:
        return 30.0

    def open(self, places: Places) -> Work:
        base = places.signals if self.column.startswith("_") else places.out

        def work(rows: Sequence[Row]) -> list[Result]:
            return [self._one(row, places, base) for row in rows]

        return work

    def _one(self, row: Row, places: Places, base: str) -> Result:
        note(Path(places.out), self.name, row)
        return {"reads": {"twice": 2 * int(Path(f"{base}/{row[self.column]}").read_text())}}


@pytest.fixture(scope="module")
def one() -> Iterator[LocalExecutor]:
    executor = LocalExecutor(1, gpus=0)
    yield executor
    executor.close()


def run(out: Path, executor: LocalExecutor, *stages: Writes | Reads) -> StagesReport:
    with ResultStore(str(out / "stages")) as store:
        places = Places.below(str(out))
        return run_stages(
            stages, rows(4), places=places, store=store, executor=executor, label="test"
        )


def test_a_lost_file_is_made_again_and_nothing_else(tmp_path: Path, one: LocalExecutor) -> None:
    stages = Writes("made"), Reads("made")
    first = run(tmp_path, one, *stages)
    (tmp_path / "w/2.txt").unlink()
    second = run(tmp_path, one, *stages)
    assert (tmp_path / "w/2.txt").read_text() == "2"
    assert second.table.equals(first.table)
    assert asked(tmp_path, "writes") == [0, 1, 2, 2, 3]
    assert asked(tmp_path, "reads") == [0, 1, 2, 3]  # from the same file comes the same
    assert [(s.computed, s.recalled) for s in second.stats] == [(1, 3), (0, 4)]


def test_an_internal_file_is_made_again_when_it_is_read(tmp_path: Path, one: LocalExecutor) -> None:
    run(tmp_path, one, Writes("_made"), Reads("_made"))
    for file in (tmp_path / "signals/w").iterdir():
        file.unlink()
    run(tmp_path, one, Writes("_made"), Reads("_made"))
    assert asked(tmp_path, "writes") == [0, 1, 2, 3]  # nobody reads them
    found = run(tmp_path, one, Writes("_made"), Reads("_made", version=2))
    assert found.table.column("twice").to_pylist() == [0, 2, 4, 6]
    assert asked(tmp_path, "writes") == sorted([*range(4), *range(4)])


def test_a_lost_file_that_cannot_be_made_again_is_told(tmp_path: Path, one: LocalExecutor) -> None:
    run(tmp_path, one, Writes("made"), Reads("made"))
    (tmp_path / "w/2.txt").unlink()
    found = run(tmp_path, one, Writes("made", fails=True), Reads("made"))
    assert [(bad.id, bad.reason) for bad in found.bad] == [(rows(4)["id"][2].as_py(), "gone")]
    assert found.table.column("twice").to_pylist() == [0, 2, None, 6]


def test_what_is_recalled_without_its_file_is_not_known(tmp_path: Path, one: LocalExecutor) -> None:
    run(tmp_path, one, Writes("made"))
    (tmp_path / "w/2.txt").unlink()
    with ResultStore(str(tmp_path / "stages")) as store:
        places = Places.below(str(tmp_path))
        found = recall([Writes("made")], rows(4), places=places, store=store)
    names = found.table.column("made").to_pylist()
    assert names == ["w/0.txt", "w/1.txt", None, "w/3.txt"]


def test_files_in_a_store() -> None:
    from fsspec import filesystem

    filesystem("memory").pipe("/lost/set/ab/one.mp4", b"1")
    present = Present()
    assert "memory://lost/set/ab/one.mp4" in present
    assert "memory://lost/set/ab/two.mp4" not in present
    assert "memory://lost/set/none/two.mp4" not in present


def test_what_killed_workers_were_writing_is_removed(tmp_path: Path) -> None:
    from kinema.curation.files import remove_leftovers

    folder = tmp_path / "clips" / "ab"
    folder.mkdir(parents=True)
    left, whole = folder / ".film_00.77.tmp.mp4", folder / "film_00.mp4"
    left.touch()
    whole.touch()
    remove_leftovers(f"{tmp_path}/clips", f"{tmp_path}/frames", "s3://bucket/signals")
    assert not left.exists()
    assert whole.exists()
