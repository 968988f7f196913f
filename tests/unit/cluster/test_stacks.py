"""py-spy's text: the same stacks together, whatever their numbers."""

from __future__ import annotations

from kinema.cluster.hostfile import Host
from kinema.cluster.running import Process
from kinema.cluster.stacks import Dump, group, main_thread, render

DUMP = """Process {pid}: /env/bin/python /env/bin/kinema train r
Python v3.11.7 (/env/bin/python3.11)

Thread {thread} (idle): "watch"
    wait (threading.py:324)
Thread {pid} (active): "MainThread"
    all_reduce (torch/distributed/distributed_c10d.py:2806)
    finish (kinema/parallel/gradients.py:{line})
    call at 0x{thread}
    run (kinema/training/loop.py:190)
    _command.<locals>.command (kinema/cli/train.py:181)
    TyperGroup.main (typer/core.py:1305)
    main (kinema/cli/main.py:73)
    <module> (kinema:6)
"""


def process(rank: int, kind: str = "rank", pid: int = 0) -> Process:
    host = Host(f"node{rank // 8 + 1}")
    return Process(host, pid or 1000 + rank, "job", kind, rank, "S", "kinema train")


def dump(rank: int, line: int) -> Dump:
    text = DUMP.format(pid=1000 + rank, thread=f"7F{rank:04X}", line=line)
    return Dump(process(rank), text)


def test_the_main_thread_without_numbers() -> None:
    assert main_thread(dump(3, 80).text) == (
        "all_reduce (torch/distributed/distributed_c10d.py:2806)",
        "finish (kinema/parallel/gradients.py:80)",
        "call at 0x..",
        "run (kinema/training/loop.py:190)",
    )
    assert main_thread("Thread 0x7F (idle)\n    work (a.py:1)\n") == ("work (a.py:1)",)
    assert main_thread("") == ()


def test_the_few_that_are_elsewhere_are_seen_at_once() -> None:
    dumps = [dump(rank, 80) for rank in range(16) if rank not in (5, 11)]
    dumps += [dump(5, 61), dump(11, 61)]
    dumps += [Dump(process(3, "helper", 77), error="py-spy did not finish within 5 s")]
    groups = group(dumps)
    assert [(g.kind, len(g.processes)) for g in groups] == [
        ("rank", 14),
        ("rank", 2),
        ("helper", 1),
    ]
    text = render(groups)
    assert "14 of 16 ranks: node1 rank 0, node1 rank 1" in text
    assert " and 8 more\n" in text
    assert "2 of 16 ranks: node1 rank 5, node2 rank 11\n    all_reduce" in text
    assert "1 of 1 helpers (decode workers, watchdogs): node1 rank 3 pid 77" in text
    assert "no stack: py-spy did not finish within 5 s" in text
