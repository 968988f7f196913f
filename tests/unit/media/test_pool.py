"""Decoding can be killed: nothing that a file does stops or harms the caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from kinema.config.errors import KinemaError
from kinema.media.errors import MediaError
from kinema.media.pool import DecodePool
from kinema.media.probe import probe
from kinema.media.read import read_frames
from kinema.media.write import write_video
from tests.unit.media import worker_calls as calls
from tests.unit.media.clips import pictures

LIMIT_S = 1.0
hasty = pytest.mark.parametrize("pool", [LIMIT_S], indirect=True)
HERE = Path("here.mp4")


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> Iterator[DecodePool]:
    """Two workers without haste, or with the limit that a test asks for."""
    with DecodePool(2, getattr(request, "param", 60.0)) as pool:
        yield pool
        pids = pool.worker_pids()
    assert not [p for p in pids if psutil.pid_exists(p)], "workers left"
    assert not [c for c in psutil.Process().children() if c.status() == psutil.STATUS_ZOMBIE]


def failure(pool: DecodePool, function: object, path: Path = HERE, *args: object) -> MediaError:
    with pytest.raises(MediaError) as caught:
        pool.submit(function, path, *args).result()  # type: ignore[arg-type]
    assert caught.value.path == path
    return caught.value


def test_results_come_back_with_their_arrays(pool: DecodePool, tmp_path: Path) -> None:
    got = pool.submit(calls.arrays, HERE).result()
    big = np.arange(3_000_000, dtype=np.float32).reshape(3, 1000, 1000)
    assert np.array_equal(got["big"], big)
    assert np.array_equal(got["turned"], big.swapaxes(0, 1)[:2])
    assert got["small"].tolist() == [1, 2, 3]
    assert got["big"].flags.writeable
    frames = pictures(12)
    write_video(tmp_path / "a.mp4", frames, fps=8)
    read = pool.submit(read_frames, tmp_path / "a.mp4", [7, 2]).result()
    assert np.array_equal(read, read_frames(tmp_path / "a.mp4", [7, 2]))


def test_workers_know_nothing_of_torch(pool: DecodePool) -> None:
    assert pool.submit(calls.modules, HERE).result() is False


@hasty
@pytest.mark.parametrize("hang", [calls.spin, calls.hold_the_interpreter])
def test_a_call_that_hangs_is_killed_within_the_limit(pool: DecodePool, hang: object) -> None:
    start = time.monotonic()
    error = failure(pool, hang)
    assert error.reason == "timeout"
    assert time.monotonic() - start >= LIMIT_S, "not before"
    assert not pool.worker_pids(), "the worker is gone"


@hasty
def test_an_endless_stream_is_killed_within_the_limit(pool: DecodePool, tmp_path: Path) -> None:
    fifo = tmp_path / "endless.mp4"
    os.mkfifo(fifo)

    def feed() -> None:
        with suppress(BrokenPipeError), open(fifo, "wb") as file:
            while True:
                file.write(bytes(1 << 16))

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert failure(pool, calls.read_to_the_end, fifo).reason == "timeout"
    feeder.join()
    assert failure(pool, probe, fifo).reason == "not_a_file", "ours does not open it at all"


@hasty
def test_a_pipe_that_nobody_feeds_is_killed_too(pool: DecodePool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.mp4")
    assert failure(pool, calls.read_to_the_end, tmp_path / "x.mp4").reason == "timeout"


def test_a_call_may_have_a_limit_of_its_own() -> None:
    with DecodePool(1, 60) as pool:
        pool.submit(calls.pid, HERE).result()
        with pytest.raises(MediaError, match=r"\(0\.3 s\)") as caught:
            pool.submit(calls.sleep, HERE, 60.0, timeout_s=0.3).result()
        assert caught.value.reason == "timeout"
        assert pool.submit(calls.sleep, HERE, 0.5).result() == HERE.name, "the pool's for others"
    with DecodePool(1, 0.3) as pool:
        assert pool.submit(calls.sleep, HERE, 0.6, timeout_s=60).result() == HERE.name


def test_each_worker_has_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that comes after it; fewer environments than workers: the rest have none."""
    monkeypatch.setenv("WHICH", "ours")

    def seen(pool: DecodePool, name: str, together: str) -> dict[int, str | None]:
        meeting = tmp_path / together
        futures = [pool.submit(calls.environment, HERE, name, meeting) for _ in range(2)]
        return dict(future.result() for future in futures)

    given = [{"WHICH": "first", "OMP_NUM_THREADS": "3"}]
    with DecodePool(2, 60, environments=given) as pool:
        before = seen(pool, "WHICH", "a")
        threads = seen(pool, "OMP_NUM_THREADS", "b")
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        while set(pool.worker_pids()) & set(before):
            with suppress(MediaError):
                pool.submit(calls.pid, HERE).result()
        after = seen(pool, "WHICH", "c")
    assert sorted(map(str, before.values())) == ["first", "ours"]
    assert {before[pid]: threads[pid] for pid in before} == {"first": "3", "ours": "1"}
    assert sorted(map(str, after.values())) == ["first", "ours"]
    assert not set(before) & set(after)


@pytest.mark.parametrize("sign", [signal.SIGSEGV, signal.SIGKILL])
def test_a_worker_that_is_killed(pool: DecodePool, sign: signal.Signals) -> None:
    error = failure(pool, calls.die, HERE, int(sign))
    assert error.reason == "crashed"
    assert sign.name in str(error)
    assert isinstance(pool.submit(calls.pid, HERE).result(), int)


def test_a_worker_that_leaves(pool: DecodePool) -> None:
    error = failure(pool, calls.leave, HERE, 7)
    assert (error.reason, error.detail) == ("crashed", "exit code 7")


def test_errors_of_the_call(pool: DecodePool) -> None:
    assert failure(pool, calls.refuse).detail == "said so"
    assert failure(pool, calls.forbidden).reason == "unreadable"
    assert failure(pool, calls.out_of_memory).reason == "crashed"


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (calls.mistake, TypeError),
        (calls.unpicklable, AttributeError),
        (lambda path: path, Exception),
    ],
)
def test_mistakes_of_ours_are_not_taken_for_bad_files(
    pool: DecodePool, function: object, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        pool.submit(function, HERE).result()  # type: ignore[arg-type]
    assert not isinstance(caught.value, MediaError)
    assert isinstance(pool.submit(calls.pid, HERE).result(), int)


def test_map_keeps_the_order_and_goes_on_after_bad_files(tmp_path: Path) -> None:
    for i in range(20):
        write_video(tmp_path / f"{i:02}.mp4", pictures(i + 1), fps=8)
    (tmp_path / "05.mp4").write_text("no video")
    os.remove(tmp_path / "11.mp4")
    with DecodePool(2, 30) as pool:
        items = [{"file": tmp_path / f"{i:02}.mp4"} for i in range(20)]
        done = list(pool.map(probe, items, call=lambda item: (item["file"],)))
    assert [item for item, _ in done] == items
    found = [r.reason if isinstance(r, MediaError) else r.num_frames for _, r in done]
    assert found == [1, 2, 3, 4, 5, "not_media", 7, 8, 9, 10, 11, "missing", *range(13, 21)]


def test_map_takes_items_only_as_it_goes(pool: DecodePool) -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            taken.append(len(taken))
            yield taken[-1]

    call = lambda i: (Path(str(i)), 0.0)  # noqa: E731
    results = pool.map(calls.sleep, endless(), call=call, in_flight=3)
    assert [next(results) for _ in range(5)] == [(i, str(i)) for i in range(5)]
    assert len(taken) <= 5 + 3
    results.close()  # type: ignore[attr-defined]


def test_unordered_map_gives_the_quick_ones_first(pool: DecodePool) -> None:
    seconds = {"slow": 0.7, "a": 0.0, "b": 0.0, "c": 0.0}
    call = lambda name: (Path(name), seconds[name])  # noqa: E731
    list(pool.map(calls.pid, [HERE, HERE]))  # both workers are up
    order = [name for name, _ in pool.map(calls.sleep, seconds, call=call, ordered=False)]
    assert sorted(order) == sorted(seconds)
    assert order[-1] == "slow"


def test_workers_are_replaced_after_some_calls_and_when_they_grow() -> None:
    with DecodePool(1, 30, calls_per_worker=3) as pool:
        pids = [pool.submit(calls.pid, HERE).result() for _ in range(7)]
        assert [len(set(pids[i : i + 3])) for i in (0, 3)] == [1, 1]
        assert len(set(pids)) == 3
    with DecodePool(1, 30, worker_bytes=200 << 20) as pool:
        first = pool.submit(calls.keep, HERE, 1).result()
        assert pool.submit(calls.keep, HERE, 300 << 20).result() == first
        assert pool.submit(calls.pid, HERE).result() != first
        assert not psutil.pid_exists(first)


def test_workers_that_cannot_start_are_not_taken_for_bad_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DecodePool(1, 5) as pool, pytest.raises(KinemaError, match="did not start") as caught:
        pool.submit(calls.pid, HERE).result()
    assert not isinstance(caught.value, MediaError)


def test_closing_cancels_what_is_not_done() -> None:
    pool = DecodePool(1, 60)
    pool.submit(calls.pid, HERE).result()
    running = pool.submit(calls.sleep, HERE, 60.0)
    waiting = pool.submit(calls.sleep, HERE, 60.0)
    while not running.running():
        time.sleep(0.01)
    pool.close()
    for future in (running, waiting):
        with pytest.raises(CancelledError):
            future.result(timeout=5)
    pool.close()  # twice does no harm


def script(body: str) -> subprocess.Popen[str]:
    """A program of its own that uses a pool; says when its workers are up."""
    text = f"""
        import sys, time, signal
        sys.path[:] = {sys.path!r}
        from pathlib import Path
        from kinema.media.pool import DecodePool
        from tests.unit.media import worker_calls as calls
        {body}
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)], stdout=subprocess.PIPE, text=True
    )


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while left := [p for p in pids if psutil.pid_exists(p)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


MAPPING = """
        with DecodePool(2, 60) as pool:
            list(pool.map(calls.pid, [Path("a"), Path("b")]))
            print(*pool.worker_pids(), flush=True)
            for _ in pool.map(calls.sleep, range(9), call=lambda i: (Path(str(i)), 60.0)):
                pass
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_program_however_it_ends(sign: signal.Signals) -> None:
    process = script(MAPPING)
    assert process.stdout
    pids = [int(p) for p in process.stdout.readline().split()]
    assert len(pids) == 2
    if sign == signal.SIGINT:  # Ctrl-C reaches the workers as well
        for pid in pids:
            os.kill(pid, sign)
        time.sleep(0.2)
        assert all(psutil.pid_exists(p) for p in pids)
    process.send_signal(sign)
    assert process.wait(timeout=20) != 0
    wait_until_gone(pids)


def test_a_forgotten_pool_does_not_keep_the_program_alive() -> None:
    process = script("""
        pool = DecodePool(2, 60)
        print(pool.submit(calls.pid, Path("a")).result(), flush=True)
    """)
    assert process.stdout
    pid = int(process.stdout.readline())
    assert process.wait(timeout=20) == 0
    wait_until_gone([pid])


def test_a_call_is_seen_while_it_runs(tmp_path: Path) -> None:
    started = tmp_path / "started"
    with DecodePool(1, 60.0) as pool:
        pool.submit(calls.say_and_wait, started)
        while not started.exists():
            time.sleep(0.01)
        ((pid, file, seconds),) = pool.at_work()
        assert pid == pool.worker_pids()[0]
        assert file == str(started)
        assert seconds > 0
    assert pool.at_work() == []


def test_a_worker_that_cannot_be_killed_is_left_and_the_next_call_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that hangs in the kernel: the signal has no effect until the disk answers."""
    monkeypatch.setattr("kinema.media.pool.KILLED_S", 0.2)
    kill = subprocess.Popen.kill
    monkeypatch.setattr(subprocess.Popen, "kill", lambda self: None)
    started = tmp_path / "started"
    with DecodePool(1, 0.5) as pool:
        with pytest.raises(MediaError, match=r"0\.5 s"):
            pool.submit(calls.say_and_wait, started).result(60)
        hung = int(started.read_text())
        assert psutil.pid_exists(hung)
        assert pool.submit(calls.pid, HERE).result(60) != hung
        monkeypatch.setattr(subprocess.Popen, "kill", kill)
    os.kill(hung, signal.SIGKILL)


def test_a_mistake_in_the_pools_own_thread_answers_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with DecodePool(1, 60.0) as pool:
        monkeypatch.setattr("kinema.media.pool._Worker.grew_beyond", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pool.submit(calls.pid, HERE).result(60)
        monkeypatch.undo()
        assert pool.submit(calls.pid, HERE).result(60) > 0
