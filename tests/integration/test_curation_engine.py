"""Curation's engine as a program: killed in the middle, and with any number of workers."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pytest

from kinema.config.errors import KinemaError
from kinema.curation import chain
from kinema.curation.engine import StagesReport, run_stages
from kinema.curation.local import LocalExecutor
from kinema.curation.stage import Places, Stage
from kinema.curation.store import ResultStore
from tests.unit.curation.engine_stages import Double, Powers, asked, rows

COUNT = 60
NAMES = ("double", "square", "cube", "last")


def stages(seconds: float = 0.0) -> list[Stage]:
    """Of one part and of two, with bad rows in each, the last with a worker of its own."""
    return [
        Double(bad=7, seconds=seconds, batch=3),
        Powers(bad=11),
        Double("last", of="cube", bad=13**3, seconds=seconds, batch=4, gpu=True),
    ]


def run(out: Path, workers: int, seconds: float = 0.0, count: int = COUNT) -> StagesReport:
    """One run in this process."""
    executor = LocalExecutor(workers, gpus=0)
    try:
        with ResultStore(str(out / "stages")) as store:
            return run_stages(
                stages(seconds),
                rows(count),
                places=Places.below(str(out)),
                store=store,
                executor=executor,
                label="here",
            )
    finally:
        executor.close()


def start(out: Path, seconds: float) -> subprocess.Popen[str]:
    """The same in a program of its own."""
    script = f"""
        import sys
        sys.path[:] = {sys.path!r}
        from pathlib import Path
        from tests.integration.test_curation_engine import run
        run(Path({str(out)!r}), 2, {seconds})
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL, text=True
    )


def kept(out: Path) -> dict[str, set[int]]:
    """Rows whose results are kept, by part."""
    with ResultStore(str(out / "stages")) as store:
        found = {}
        for part in (part for stage in stages() for part in stage.parts):
            known = store.known(part)
            ids = known.take(known.order).column("id").to_pylist()
            found[part.name] = {int(one, 16) for one in ids}
    return found


def as_bytes(table: pa.Table) -> bytes:
    """A table's rows in the order of their ids, as an Arrow stream."""
    sink = pa.BufferOutputStream()
    sorted_ = table.sort_by("id").combine_chunks()
    with pa.ipc.new_stream(sink, sorted_.schema) as stream:
        stream.write_table(sorted_)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def kill_when(out: Path, through: int) -> None:
    """Start a run, and kill it when the last stage has been asked for so many rows."""
    process = start(out, seconds=0.03)
    family = [psutil.Process(process.pid)]
    while len(asked(out, "last")) < through:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    family += family[0].children(recursive=True)
    with pytest.raises(KinemaError, match="another curation run"):
        ResultStore(str(out / "stages"))
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "workers end with the run"


def test_a_killed_run_goes_on_and_asks_nothing_that_was_kept(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 2)
    out = tmp_path / "killed"
    out.mkdir()
    before = {name: Counter[int]() for name in NAMES}
    known: dict[str, set[int]] = {name: set() for name in NAMES}
    # Each run loses what its last batches found: two a worker, and one that waits.
    under_way = 3 * (2 + 1)
    for through in (14, 30, None):
        if through is not None:
            kill_when(out, through)
        else:
            report = run(out, 2)
        for name in NAMES:
            now = Counter(asked(out, name))
            assert not {row for row in now if now[row] > before[name][row]} & known[name], (
                f"{name}: kept, and asked again"
            )
            before[name] = now
        known = kept(out)
        for name in NAMES:
            if through is not None:
                assert 0 < len(known[name]) < COUNT
            assert len(set(before[name]) - known[name]) <= under_way, f"{name}: not kept"
    assert report.table.equals(whole.table)
    assert report.bad == whole.bad
    assert [stats.recalled > 0 for stats in report.stats] == [True] * 3


def test_results_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    reports = {workers: run(tmp_path / str(workers), workers) for workers in (1, 2, 4)}
    first = as_bytes(reports[1].table)
    assert len(first) > 1000
    for workers, report in reports.items():
        assert as_bytes(report.table) == first, f"{workers} workers"
        assert report.bad == reports[1].bad
        assert [bad.reason for bad in report.bad] == ["odd", "round", "odd"]
        counts = [(s.computed, s.recalled, s.bad) for s in report.stats]
        assert counts == [(COUNT, 0, 1), (COUNT - 1, 0, 1), (COUNT - 2, 0, 1)]
        for name in NAMES:
            assert len(asked(tmp_path / str(workers), name)) == len(
                set(asked(tmp_path / str(workers), name))
            ), "each row once"


def test_workers_that_are_killed_at_random_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the two processes for CPU stages is killed once, from outside, at work."""
    whole = run(tmp_path / "whole", 2)
    out = tmp_path / "killed"
    executor = LocalExecutor(2, gpus=0)
    victims: list[int] = []
    done = 0
    with ResultStore(str(out / "stages")) as store:
        honest = executor.stream

        def stream(*args: object) -> object:
            nonlocal done
            for one in honest(*args):  # type: ignore[arg-type]
                yield one
                done += 1
                pids = executor.worker_pids()
                if done in (20, 60) and pids:
                    victims.append(pids[done // 60])
                    psutil.Process(victims[-1]).kill()

        monkeypatch.setattr(executor, "stream", stream)
        report = run_stages(
            stages(0.005), rows(COUNT), places=Places.below(str(out)), store=store,
            executor=executor, label="killed",
        )  # fmt: skip
    executor.close()
    assert len(set(victims)) == 2
    assert report.table.equals(whole.table)
    assert report.bad == whole.bad, "no row was lost to it"
    for name in NAMES:
        twice = len(asked(out, name)) - len(set(asked(out, name)))
        assert twice <= 2 * 3, f"{name}: only batches that died"
    assert chain.TRIES == 2
