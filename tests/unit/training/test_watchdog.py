"""Who is stalled, who is to blame, and what a watchdog does about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kinema.media.traced import TRACER
from kinema.telemetry.spans import Spans
from kinema.training import stacks
from kinema.training.culprit import Evidence, Limits, Seen, judge, silent, suspects
from kinema.training.heartbeat import END, PHASES, SLOT, Heartbeat, HeartbeatReader, State
from kinema.training.watch import Expectation, progress_of
from kinema.training.watchdog import Config, Watchdog, heartbeat_path

LIMITS = Limits(step=75.0, first=1800.0, data=75.0)


def seen(
    rank: int, phase: str, idle_s: float, *, turn: int = 5, limit_s: float = 75.0, **more: Any
) -> Seen:
    order = PHASES.index(phase) if phase in PHASES else 0
    state = State(rank=rank, pid=1000 + rank, phase=phase, order=order, turn=turn, first=False)
    return Seen(state, node=rank // 2, host="h", idle_s=idle_s, limit_s=limit_s, **more)


# Heartbeats


def test_a_heartbeat_tells_phases_and_the_work_in_hand(tmp_path: Path) -> None:
    heart, spans = Heartbeat(tmp_path / "beat", 3), Spans()
    spans.on_enter = heart.enter
    reader = HeartbeatReader(tmp_path / "beat")
    heart.turn(7)
    heart.await_micro(1)
    heart.hold("144p-51f", ["a.mp4", "b.mp4"], expected_s=2.0, first=False)
    with spans("optimizer"), spans("agree"):
        state = reader.read()
        assert state is not None
        assert (state.rank, state.step, state.turn, state.micro) == (3, 7, 1, 1)
        assert (state.phase, state.bucket, state.clips) == ("agree", "144p-51f", ["a.mp4", "b.mp4"])
    state = reader.read()
    assert state is not None
    assert (state.phase, PHASES[state.order]) == ("", "optimizer")


def test_a_writer_that_is_frozen_half_way_leaves_its_last_whole_state(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "beat", 0)
    heart.enter("forward")
    heart.enter("backward")
    reader = HeartbeatReader(tmp_path / "beat")
    at = (heart._number % 2) * SLOT
    heart._map[at + 40] ^= 0xFF
    state = reader.read()
    assert state is not None
    assert state.phase == "forward"


def test_names_too_long_for_the_file_are_left_out(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path / "beat", 0)
    heart.hold("b", ["x" * 2000] * 60, expected_s=0.0, first=True)
    state = HeartbeatReader(tmp_path / "beat").read()
    assert state is not None
    assert (state.clips, state.count, state.bucket) == ([], 60, "b")


# Limits


def test_limits_fit_the_work_at_hand() -> None:
    state = State(rank=0, pid=1, phase="forward", first=False)
    assert LIMITS.of(state) == 75
    state.expected_s = 40.0
    assert LIMITS.of(state) == 200
    state.phase = "data"
    assert LIMITS.of(state) == 75
    assert Limits(75, 1800, 150).of(state) == 150
    for phase in ("save", "preview", "validation", "warm up", "order"):
        state.phase = phase
        assert LIMITS.of(state) == 1800
    state.phase, state.first = "forward", True
    assert LIMITS.of(state) == 1800


def test_expected_times_follow_the_rate_seen() -> None:
    now = [0.0]
    expected = Expectation(compiles=False, clock=lambda: now[0])
    for seconds, cost in ((50.0, 10.0), (2.0, 10.0), (2.0, 10.0)):
        expected.begin()
        assert expected.of("a", cost)[1] == (seconds == 50.0)  # the first step says little
        now[0] += seconds
        expected.end()
    assert expected.of("b", 100.0)[0] > 20.0
    for _ in range(40):
        expected.begin()
        expected.of("a", 10.0)
        now[0] += 2.0
        expected.end()
    assert expected.of("b", 100.0) == (pytest.approx(20.0, rel=0.01), False)
    assert expected.longest_s == 2.0


def test_what_is_compiled_for_a_new_bucket_may_take_long() -> None:
    expected = Expectation(compiles=True, clock=iter(range(100)).__next__)
    expected.begin()
    assert expected.of("a", 1.0)[1]
    expected.end()
    expected.begin()
    assert not expected.of("a", 1.0)[1]
    assert expected.of("b", 1.0)[1]


# Who is to blame


def test_who_waits_for_another_is_not_suspected() -> None:
    ranks = [seen(0, "reduce", 90), seen(1, "data", 80), seen(2, "agree", 85)]
    assert suspects(ranks) == [ranks[1]]
    # It has had less time than it may take: the others wait on.
    assert suspects([seen(0, "reduce", 90), seen(1, "data", 80, limit_s=200)]) == []


def test_saving_and_previews_by_the_first_rank_are_no_stall() -> None:
    waiting = [seen(rank, "reduce", 300, turn=6) for rank in (1, 2, 3)]
    preview = seen(0, "preview", 310, limit_s=1800)
    assert suspects([preview, *waiting]) == []
    assert suspects([seen(0, "preview", 1810, limit_s=1800), *waiting])[0].state.rank == 0


def test_a_rank_that_came_to_the_end_is_not_waited_for() -> None:
    assert suspects([seen(0, END, 1000), seen(1, END, 1000, process="dead")]) == []


@pytest.mark.parametrize("process", ["stopped", "dead"])
def test_a_stopped_or_dead_rank_comes_first_wherever_it_is(process: str) -> None:
    ranks = [seen(0, "reduce", 90), seen(1, "agree", 80, process=process)]
    verdict = judge(ranks, {})
    assert verdict.culprit is ranks[1]
    assert process in str(verdict)
    # A debugger may hold it for a moment.
    assert suspects([seen(0, "reduce", 20), seen(1, "agree", 10, process=process)]) == []


def test_among_ranks_at_the_same_place_the_stack_and_the_collectives_tell() -> None:
    ranks = [seen(rank, "forward", 80 + rank) for rank in range(3)]
    inside = Evidence(in_collective=True, enqueued=41)
    by_stack = {
        0: inside,
        1: Evidence(in_collective=False, enqueued=41, at="f (x.py:3)"),
        2: inside,
    }
    assert judge(ranks, by_stack).culprit is ranks[1]
    assert "in f (x.py:3)" in str(judge(ranks, by_stack))
    by_count = {0: inside, 1: inside, 2: Evidence(in_collective=True, enqueued=40)}
    assert judge(ranks, by_count).culprit is ranks[2]
    silent_one = {0: inside, 1: inside}  # the third does not answer
    assert judge(ranks, silent_one).culprit is ranks[2]
    alike = {rank: Evidence(in_collective=False, enqueued=41) for rank in range(3)}
    assert judge(ranks, alike).culprit is ranks[2]  # it stands still for longest


def test_nobody_is_named_where_all_wait_in_the_same_collective() -> None:
    ranks = [seen(rank, "reduce", 80) for rank in range(3)]
    verdict = judge(ranks, {rank: Evidence(True, 41) for rank in range(3)})
    assert verdict.culprit is None
    assert "every rank waits" in str(verdict)


def test_a_rank_that_waits_for_data_is_told_with_the_oldest_file() -> None:
    ranks = [seen(0, "reduce", 90), seen(1, "data", 80)]
    work = [(77, "/d/new.mp4", 3.0), (78, "/d/old.mp4", 79.0)]
    verdict = judge(ranks, {1: Evidence(decoding=work)})
    assert verdict.file == "/d/old.mp4"
    assert "decode worker 78 is on /d/old.mp4" in str(verdict)


def test_a_machine_that_is_not_heard_of_is_named() -> None:
    assert silent({0: 0.0, 1: 99.0}, 3, limit_s=50.0) == [1, 2]
    verdict = judge([seen(0, "reduce", 90)], {}, [1, 2])
    assert verdict.culprit is None
    assert "node 1, 2 does not answer" in str(verdict)


def test_collectives_of_all_groups_are_counted() -> None:
    record = {
        "pg_status": {
            "0": {"last_enqueued_collective": 7, "last_started_collective": -1},
            "1": {"last_enqueued_collective": 3, "last_started_collective": 2},
        }
    }
    assert progress_of([record]) == {"enqueued": 10, "started": 2}
    assert progress_of([]) == {"enqueued": None, "started": None}


# Stacks


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `code`, once it has said so; killed in the end."""
    text = f"print('here', flush=True)\n{textwrap.dedent(code)}"
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_stack_of_a_process_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACER, str(os.getpid()))
    code = """
        import time
        from kinema.media.traced import allow_tracer
        allow_tracer()
        print("ready", flush=True)
        def asleep():
            time.sleep(99)
        asleep()
    """
    with child(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while "asleep" not in (stack := stacks.dump_stack(process.pid)).text:
            if "may not trace" in stack.text:
                pytest.skip("this machine lets nobody trace processes")
            time.sleep(0.05)
        assert stack.whole
        os.kill(process.pid, signal.SIGSTOP)
        while stacks.process_state(process.pid) != "stopped":
            time.sleep(0.01)
        stack = stacks.dump_stack(process.pid)
        assert stack.whole
        assert stack.at is not None
        assert stack.at.startswith("asleep")
        assert stack.in_collective is False
    assert stacks.process_state(process.pid) == "dead"
    assert not stacks.dump_stack(process.pid).whole


def test_where_tracing_is_forbidden_the_process_writes_its_own_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = stacks.Stack("this user may not trace processes (ptrace)", False)
    monkeypatch.setattr(stacks, "_py_spy", lambda command: refused)
    file = tmp_path / "fault.txt"
    code = f"""
        import faulthandler, signal, time
        faulthandler.register(signal.SIGUSR2, file=open({str(file)!r}, "w"))
        print("ready", flush=True)
        def asleep():
            time.sleep(99)
        asleep()
    """
    with child(code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while "asleep" not in (stack := stacks.dump_stack(process.pid, fault_file=file)).text:
            time.sleep(0.05)
        assert stack.whole
        assert "may not trace" in stack.text
        os.kill(process.pid, signal.SIGSTOP)
        while stacks.process_state(process.pid) != "stopped":
            time.sleep(0.01)
        assert stacks.dump_stack(process.pid, fault_file=file) == refused


def test_a_thread_inside_a_collective_is_seen() -> None:
    text = 'Thread 1 (idle): "MainThread"\n    all_reduce (/x/torch/distributed/c10d.py:3)\n'
    assert stacks.Stack(text, True).in_collective
    deep = (
        'Thread 1: "MainThread"\n'
        + "    f (/x/a.py:1)\n" * 9
        + "    w (/x/torch/distributed/e.py:1)"
    )
    assert not stacks.Stack(deep, True).in_collective  # what called all the rest
    assert stacks.Stack("no stack", False).in_collective is None


# The whole watch, over two machines


def test_two_machines_agree_on_the_culprit_and_end_their_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinema.training.stall_report.ANSWER_S", 0.1)  # nobody answers here
    asleep = "import time\ntime.sleep(99)"
    with child(asleep) as first, child(asleep) as second:
        _two_machines(tmp_path, [first, second])


def _two_machines(tmp_path: Path, sleepers: list[subprocess.Popen[str]]) -> None:
    run, shared = tmp_path / "run", tmp_path / "run" / ".watch" / "x"
    shared.mkdir(parents=True)
    dogs = []
    for node, process in enumerate(sleepers):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        heart = Heartbeat(heartbeat_path(folder, node), node)
        heart.state.pid = process.pid
        heart.turn(4)
        heart.turn(5)
        heart.enter("reduce" if node == 0 else "forward")
        Config(
            parent=os.getppid(), node=node, nodes=2, host=f"machine{node}", folder=str(folder),
            shared=str(shared), run=str(run), ranks=[(node, process.pid)],
            limits=Limits(step=1.0, first=9.0, data=1.0),
        ).write(folder)  # fmt: skip
        dogs.append(Watchdog(Config.read(folder)))
    found: list[bool] = []
    threads = [threading.Thread(target=lambda dog=dog: found.append(dog.run())) for dog in dogs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True, True]
    assert [process.wait(10) for process in sleepers] == [-signal.SIGKILL] * 2
    (folder,) = (run / "stalls").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert (report["culprit"]["rank"], report["culprit"]["host"]) == (1, "machine1")
    assert {path.name for path in folder.glob("*.stack")} == {"rank-0.stack", "rank-1.stack"}
    assert "rank 1 (node 1 machine1" in (run / "events.jsonl").read_text()
