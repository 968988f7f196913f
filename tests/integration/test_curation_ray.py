"""Stages on Ray: the same results as here, also when its processes are killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from kinema.config.errors import KinemaError
from kinema.curation.engine import StagesReport, run_stages
from kinema.curation.executor import Executor
from kinema.curation.local import LocalExecutor
from kinema.curation.ray_cluster import RayExecutor
from kinema.curation.ray_worker import sees
from kinema.curation.stage import Places, Stage
from kinema.curation.store import ResultStore
from tests.unit.curation.engine_stages import Double, Wrong, asked, rows

COUNT = 24


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayExecutor]:
    """Ray on this machine, with two CPUs."""
    pytest.importorskip("ray")
    executor = RayExecutor("local", cpus=2)
    yield executor
    executor.close()


def chain(seconds: float = 0.0, dies: int | None = None) -> list[Stage]:
    """A stage on CPUs and one with a model; one row is bad in each."""
    double = Double(bad=7, dies=dies, seconds=seconds)
    return [double, Double("four", of="double", gpu=True, batch=4, bad=24, seconds=seconds)]


def run(executor: Executor, out: Path, stages: list[Stage], count: int = COUNT) -> StagesReport:
    out.mkdir(exist_ok=True)
    with ResultStore(str(out / "stages")) as store:
        return run_stages(
            stages,
            rows(count),
            places=Places.below(str(out)),
            store=store,
            executor=executor,
            label="here",
        )


def local(out: Path, stages: list[Stage]) -> StagesReport:
    executor = LocalExecutor(2, gpus=0)
    try:
        return run(executor, out, stages)
    finally:
        executor.close()


def test_an_address_without_a_cluster() -> None:
    """Before any other test has started Ray in this process."""
    pytest.importorskip("ray")
    with pytest.raises(KinemaError, match="no Ray cluster"):
        RayExecutor("127.0.0.1:1")


@pytest.mark.slow
def test_ray_gives_what_local_processes_give(cluster: RayExecutor, tmp_path: Path) -> None:
    here = local(tmp_path / "here", chain())
    # Row 3 kills the process that computes it, once: below Ray's, so that limits are the same.
    there = run(cluster, tmp_path / "there", chain(dies=3))
    assert there.table.equals(here.table)
    assert there.bad == here.bad
    assert [bad.stage for bad in there.bad] == ["double", "four"]
    assert [stats.computed for stats in there.stats] == [COUNT, COUNT - 1]
    again = run(cluster, tmp_path / "there", chain())
    assert again.table.equals(here.table)
    assert [stats.computed for stats in again.stats] == [0, 0]
    # A store is one, whoever fills it.
    assert local(tmp_path / "there", chain()).stats[1].recalled == COUNT - 1

    with pytest.raises(KinemaError, match="there is no model") as caught:
        run(cluster, tmp_path / "wrong", [Wrong("set-up")])
    assert caught.value.hint == "fetch it"
    with pytest.raises(ZeroDivisionError, match="not by zero"):
        run(cluster, tmp_path / "mistake", [Wrong("mistake")])

    killed = threading.Event()

    def kill() -> None:
        """End the actor with the model when it has begun."""
        while len(asked(tmp_path / "killed", "four")) < 5:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if _command(process).startswith("ray::MapWorker"):
                    process.send_signal(signal.SIGKILL)
                    killed.set()

    (tmp_path / "killed").mkdir()
    killer = threading.Thread(target=kill)
    killer.start()
    after = run(cluster, tmp_path / "killed", chain(seconds=0.1))
    killer.join()
    assert killed.is_set()
    assert after.table.equals(here.table)
    assert after.bad == here.bad
    assert [stats.computed for stats in after.stats] == [COUNT, COUNT - 1]


@pytest.mark.slow
def test_a_killed_driver_loses_what_was_under_way(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = f"""
        import sys
        sys.path[:] = {sys.path!r}
        from pathlib import Path
        from kinema.curation.ray_cluster import RayExecutor
        from tests.integration.test_curation_ray import chain, run
        run(RayExecutor("local", cpus=2), Path({str(tmp_path)!r}), chain(seconds=0.1), 200)
    """
    driver = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    family: list[psutil.Process] = []
    try:
        while len(asked(tmp_path, "four")) < 12:
            assert driver.poll() is None
            time.sleep(0.1)
    finally:
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
        # Its workers end with it, though not at once: until then they may still ask. Two processes
        # that Ray looks after itself with stay.
        workers = [p for p in family if not _command(p).endswith("Agent")]
        _, alive = psutil.wait_procs(workers, timeout=30)
        for process in family:
            with suppress(psutil.Error):
                process.kill()
    assert not alive
    before = [asked(tmp_path, name) for name in ("double", "four")]
    report = local_of(tmp_path)
    for name, first in zip(("double", "four"), before, strict=True):
        twice = len(asked(tmp_path, name)) - len(set(asked(tmp_path, name)))
        assert twice < len(first) / 2 or twice < 20, f"{twice} of {len(first)} asked again"
    assert report.stats[0].recalled > 0
    assert set(report.table["double"].drop_null().to_pylist()) == {2 * v for v in range(200)} - {14}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def local_of(out: Path) -> StagesReport:
    executor = LocalExecutor(2, gpus=0)
    try:
        return run(executor, out, chain(), 200)
    finally:
        executor.close()


def test_a_node_that_does_not_see_the_folder_is_told(tmp_path: Path) -> None:
    from importlib.metadata import version

    marker = tmp_path / "marker"
    marker.write_text("here")
    ours = version("kinema")
    assert sees(str(marker), ours) == ""
    assert "cannot read the run's folder" in sees(str(tmp_path / "none"), ours)
    assert f"it has kinema {ours}, here it is 0" in sees(str(marker), "0")


def test_without_ray_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KinemaError, match="needs the package ray") as caught:
        RayExecutor("local")
    assert "kinema[ray]" in str(caught.value)
