"""Chains of stages in processes of this machine: each row once, whatever happens to workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kinema.config.errors import KinemaError
from kinema.curation import chain
from kinema.curation.engine import StagesReport, run_stages
from kinema.curation.executor import Done, Executor, Task
from kinema.curation.local import LocalExecutor
from kinema.curation.stage import Places, Stage
from kinema.curation.store import ResultStore
from tests.unit.curation.engine_stages import Double, Powers, Where, Wrong, asked, order, rows

HASTY_S = 4.0
"""For opening a stage, in tests in which a row hangs."""


@pytest.fixture(scope="module")
def two() -> Iterator[LocalExecutor]:
    """Two workers that all tests share: they start once."""
    executor = LocalExecutor(2, gpus=0)
    yield executor
    executor.close()


def run(
    out: Path, executor: Executor, *stages: Stage, table: pa.Table | None = None
) -> StagesReport:
    with ResultStore(str(out / "stages")) as store:
        return run_stages(
            stages,
            rows(10) if table is None else table,
            places=Places.below(str(out)),
            store=store,
            executor=executor,
            label="test",
        )


def column(report: StagesReport, name: str) -> list[Any]:
    values: list[Any] = report.table.column(name).to_pylist()
    return values


def doubled(count: int, but: tuple[int, ...] = (), times: int = 2) -> list[int | None]:
    return [None if i in but else times * i for i in range(count)]


def stats(report: StagesReport) -> list[tuple[str, int, int, int]]:
    return [(s.name, s.computed, s.recalled, s.bad) for s in report.stats]


def test_every_row_goes_through_every_stage(tmp_path: Path, two: LocalExecutor) -> None:
    chain_ = Double(batch=3), Double("fourfold", of="double", batch=4)
    report = run(tmp_path, two, *chain_)
    assert report.table.column_names == ["id", "state", "path", "value", "double", "fourfold"]
    assert report.table.select(["id", "state", "path", "value"]).equals(rows(10))
    assert column(report, "double") == doubled(10)
    assert column(report, "fourfold") == doubled(10, times=4)
    assert report.bad == []
    assert stats(report) == [("double", 10, 0, 0), ("fourfold", 10, 0, 0)]
    assert asked(tmp_path, "double") == asked(tmp_path, "fourfold") == list(range(10))


def test_what_is_known_is_not_asked_again(tmp_path: Path, two: LocalExecutor) -> None:
    chain_ = Double(), Double("fourfold", of="double")
    first = run(tmp_path, two, *chain_)
    again = run(tmp_path, two, *chain_)
    assert again.table.equals(first.table)
    assert stats(again) == [("double", 0, 10, 0), ("fourfold", 0, 10, 0)]
    longer = run(tmp_path, two, *chain_, table=rows(12))
    assert column(longer, "fourfold") == doubled(12, times=4)
    assert stats(longer) == [("double", 2, 10, 0), ("fourfold", 2, 10, 0)]
    assert asked(tmp_path, "double") == asked(tmp_path, "fourfold") == list(range(12))


def test_a_new_version_asks_that_stage_only(tmp_path: Path, two: LocalExecutor) -> None:
    run(tmp_path, two, Double(), Double("other"))
    report = run(tmp_path, two, Double(version=2), Double("other"))
    assert stats(report) == [("double", 10, 0, 0), ("other", 0, 10, 0)]
    assert len(asked(tmp_path, "double")) == 20
    assert len(asked(tmp_path, "other")) == 10


def test_a_changed_file_is_asked_again(tmp_path: Path, two: LocalExecutor) -> None:
    run(tmp_path, two, Double())
    changed = rows(10).set_column(1, "state", pa.array(["s"] * 9 + ["t"]))
    report = run(tmp_path, two, Double(), table=changed)
    assert stats(report) == [("double", 1, 9, 0)]
    assert asked(tmp_path, "double") == [*range(10), 9]


def test_results_depend_on_the_columns_that_a_part_names(
    tmp_path: Path, two: LocalExecutor
) -> None:
    run(tmp_path, two, Double())
    values = pa.array([0, 1, 2, 33, 4, 5, 6, 7, 8, 9])
    report = run(tmp_path, two, Double(), table=rows(10).set_column(3, "value", values))
    assert column(report, "double") == [2 * value for value in values.to_pylist()]
    assert asked(tmp_path, "double") == sorted([*range(10), 3])


def test_results_depend_on_what_an_earlier_stage_finds(tmp_path: Path, two: LocalExecutor) -> None:
    """Rows that an earlier stage has to look at again are asked of the later one, too."""
    last = Double("last", of="double")
    run(tmp_path, two, Double(), last)
    report = run(tmp_path, two, Double(version=2, offset=7), last)
    assert column(report, "double") == [2 * i + (i >= 7) for i in range(10)]
    assert column(report, "last") == [2 * value for value in column(report, "double")]
    again = run(tmp_path, two, Double(version=2, offset=7), last)
    assert stats(again) == [("double", 0, 10, 0), ("last", 0, 10, 0)]
    assert again.table.equals(report.table)


def test_only_missing_parts_are_asked(tmp_path: Path, two: LocalExecutor) -> None:
    run(tmp_path, two, Powers())
    report = run(tmp_path, two, Powers(versions=(1, 2)), table=rows(11))
    assert column(report, "square") == [i**2 for i in range(11)]
    assert column(report, "cube") == [i**3 for i in range(11)]
    assert column(report, "_root") == [[i] * i for i in range(11)]
    assert asked(tmp_path, "square") == list(range(11))
    assert asked(tmp_path, "cube") == sorted([*range(10), *range(11)])


def test_a_bad_row_goes_no_further(tmp_path: Path, two: LocalExecutor) -> None:
    chain_ = Double(bad=4), Double("fourfold", of="double", bad=12)
    for attempt in range(2):
        report = run(tmp_path, two, *chain_)
        assert column(report, "double") == doubled(10, but=(4,))
        assert column(report, "fourfold") == doubled(10, but=(4, 6), times=4)
        found = [(b.id, b.path, b.stage, b.part, b.reason, b.message) for b in report.bad]
        assert found == [
            (f"{4:032x}", "clip-4.mp4", "double", "double", "odd", "4 is odd"),
            (f"{6:032x}", "clip-6.mp4", "fourfold", "fourfold", "odd", "12 is odd"),
        ]
        expected = [("double", 10, 0, 1), ("fourfold", 9, 0, 1)]
        assert attempt or stats(report) == expected
    assert asked(tmp_path, "double") == list(range(10))
    assert asked(tmp_path, "fourfold") == [i for i in range(10) if i != 4]


def test_a_row_with_one_bad_part_goes_no_further(tmp_path: Path, two: LocalExecutor) -> None:
    """In the first run and in one that recalls it; what the other part gave is kept."""
    for _ in range(2):
        report = run(tmp_path, two, Powers(bad=4), Double(of="square"))
        assert column(report, "square") == [i**2 for i in range(10)]
        assert column(report, "cube") == [None if i == 4 else i**3 for i in range(10)]
        assert column(report, "double") == [None if i == 4 else 2 * i**2 for i in range(10)]
        assert [(b.id, b.part, b.reason) for b in report.bad] == [(f"{4:032x}", "cube", "round")]
    assert asked(tmp_path, "double") == [i for i in range(10) if i != 4]
    # Another version of the good part changes nothing about the bad one.
    report = run(tmp_path, two, Powers(versions=(2, 1), bad=4), Double(of="square"))
    assert len(report.bad) == 1
    assert 4 not in asked(tmp_path, "double")


def test_failures_that_may_pass_are_asked_again(tmp_path: Path, two: LocalExecutor) -> None:
    report = run(tmp_path, two, Double(bad=4, passing=True), Double("other"))
    assert [(b.reason, b.passing) for b in report.bad] == [("odd", True)]
    assert column(report, "other") == doubled(10, but=(4,))
    mended = run(tmp_path, two, Double(), Double("other"))
    assert mended.bad == []
    assert column(mended, "other") == doubled(10)
    assert asked(tmp_path, "double") == sorted([*range(10), 4])
    assert asked(tmp_path, "other") == list(range(10))


def test_a_killed_worker_loses_no_row(tmp_path: Path) -> None:
    executor = LocalExecutor(1, gpus=0)
    report = run(tmp_path, executor, Double(dies=5), Double("fourfold", of="double"))
    executor.close()
    assert report.bad == []
    assert column(report, "fourfold") == doubled(10, times=4)
    # 4 was done when the worker died at 5, in the same batch; no other batch is asked again.
    assert asked(tmp_path, "double") == sorted([*range(10), 4])
    assert asked(tmp_path, "fourfold") == list(range(10))


def test_only_the_row_that_kills_its_workers_is_bad(tmp_path: Path) -> None:
    executor = LocalExecutor(1, gpus=0)
    killer = Double(dies=5, always=True, batch=3)
    report = run(tmp_path, executor, killer)
    assert column(report, "double") == doubled(10, but=(5,))
    (bad,) = report.bad
    assert (bad.id, bad.reason, bad.passing) == (f"{5:032x}", "crashed", True)
    assert "SIGKILL" in bad.message
    mended = run(tmp_path, executor, Double(batch=3))
    executor.close()
    assert column(mended, "double") == doubled(10)
    assert stats(mended) == [("double", 1, 9, 0)], "the others are not asked again"


def test_a_hanging_row_is_ended_by_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "OPEN_S", HASTY_S)
    executor = LocalExecutor(2, gpus=0)
    report = run(tmp_path, executor, Double(hangs=5, limit=0.2, batch=1), table=rows(8))
    executor.close()
    assert column(report, "double") == doubled(8, but=(5,))
    (bad,) = report.bad
    assert (bad.id, bad.reason, bad.passing) == (f"{5:032x}", "timeout", True)
    assert asked(tmp_path, "double") == [0, 1, 2, 3, 4, 6, 7]


def test_stages_with_a_model_have_workers_of_their_own(tmp_path: Path, two: LocalExecutor) -> None:
    report = run(tmp_path, two, Where(gpu=True), Double())
    pids = set(column(report, "pid"))
    assert len(pids) == 1
    assert not pids & {os.getpid(), *two.worker_pids()}
    assert set(column(report, "variable")) == {str(os.cpu_count())}


def test_each_gpu_has_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    executor = LocalExecutor(1, gpus=2)
    stage = Where(variable="CUDA_VISIBLE_DEVICES", gpu=True)
    assert executor.workers(stage) == 2
    report = run(tmp_path, executor, stage, table=rows(40))
    executor.close()
    assert set(column(report, "variable")) <= {"3", "5"}
    assert len(set(column(report, "pid"))) == len(set(column(report, "variable")))


@pytest.mark.parametrize("stage", [Where(threads=3), Where(max_workers=1)])
def test_stages_that_wait_run_in_this_process(
    tmp_path: Path, two: LocalExecutor, stage: Where
) -> None:
    report = run(tmp_path, two, stage)
    assert set(column(report, "pid")) == {os.getpid()}
    assert two.workers(stage) == 1


def test_set_up_that_is_wrong_ends_the_run(tmp_path: Path, two: LocalExecutor) -> None:
    with pytest.raises(KinemaError, match="there is no model") as caught:
        run(tmp_path, two, Double(), Wrong("set-up"))
    assert (caught.value.where, caught.value.hint) == ("models/none", "fetch it")
    report = run(tmp_path, two, Double())
    computed, recalled = report.stats[0].computed, report.stats[0].recalled
    assert recalled >= 2, "what was found before is kept"
    assert computed + recalled == 10


def test_a_full_disk_ends_the_run(tmp_path: Path, two: LocalExecutor) -> None:
    with pytest.raises(KinemaError, match="No space left") as caught:
        run(tmp_path, two, Wrong("disk"))
    assert caught.value.where == "clips/x.mp4"


@pytest.mark.parametrize("way", ["mistake", "few", "part", "type"])
def test_a_mistake_in_a_stage_ends_the_run_and_says_where(
    tmp_path: Path, two: LocalExecutor, way: str
) -> None:
    with pytest.raises((ZeroDivisionError, AssertionError, TypeError)) as caught:
        run(tmp_path, two, Wrong(way))
    notes = " ".join(getattr(caught.value, "__notes__", []))
    assert "'wrong'" in notes
    assert "clip-" in notes
    assert asked(tmp_path, "wrong") == []
    assert column(run(tmp_path, two, Double()), "double") == doubled(10), "the pool still works"


def test_a_slow_stage_holds_back_the_ones_before_it(tmp_path: Path, two: LocalExecutor) -> None:
    slow = Double("slow", seconds=0.02, batch=2)
    table = rows(120)
    report = run(tmp_path, two, Double(batch=2), slow, table=table)
    assert column(report, "slow") == doubled(120)
    ahead, most = 0, 0
    for name, _ in order(tmp_path):
        ahead += 1 if name == "double" else -1
        most = max(most, ahead)
    # Waiting: two batches of two rows for each of two workers; and what both stages have under way.
    assert most <= 2 * 2 * 2 + 2 * 2 * 3


def test_later_stages_begin_before_the_first_has_ended(tmp_path: Path, two: LocalExecutor) -> None:
    run(tmp_path, two, Double(), Double("last", of="double"), table=rows(60))
    names = [name for name, _ in order(tmp_path)]
    assert names.index("last") < 30


def test_tasks_are_taken_only_as_there_is_room(tmp_path: Path, two: LocalExecutor) -> None:
    taken = 0

    def tasks() -> Iterator[Task]:
        nonlocal taken
        for number, row in enumerate(rows(1000).to_pylist()):
            taken += 1
            yield Task(number, row, (("double",),))

    results = two.stream([Double()], tasks(), Places.below(str(tmp_path)))
    first = [next(results) for _ in range(4)]
    assert all(isinstance(done, Done) for done in first)
    assert taken <= 40
    results.close()  # type: ignore[attr-defined]
    assert two.worker_pids(), "they serve the next chain"


@pytest.mark.parametrize("count", [0, 1])
def test_small_tables(tmp_path: Path, two: LocalExecutor, count: int) -> None:
    report = run(tmp_path, two, Double(batch=8), Powers(), table=rows(count))
    assert report.table.num_rows == count
    assert report.table.schema.field("double").type == pa.int64()
    assert report.table.schema.field("_root").type == pa.list_(pa.int64())
    assert column(report, "double") == doubled(count)


def test_a_row_that_is_there_twice_gets_its_result_twice(
    tmp_path: Path, two: LocalExecutor
) -> None:
    table = pa.concat_tables([rows(3), rows(3)])
    assert column(run(tmp_path, two, Double(), table=table), "double") == doubled(3) * 2
    assert stats(run(tmp_path, two, Double(), table=table)) == [("double", 0, 6, 0)]


def test_progress_ends_at_the_number_of_rows(
    tmp_path: Path, two: LocalExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that are known, that are bad in a middle stage, and that go to the end all count."""
    run(tmp_path, two, Double(), table=rows(3))
    run(tmp_path, two, Double(), Powers(bad=4), Double("last", of="cube"))
    assert "10/10 rows" in capsys.readouterr().err.splitlines()[-1]
