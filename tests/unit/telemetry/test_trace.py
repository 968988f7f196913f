"""Synthetic traces, as a GPU and a CPU leave them, and what is said about them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from kinema.telemetry.advice import Facts, advise, render
from kinema.telemetry.trace import Breakdown, break_down, intersect, read_trace, union

Event = dict[str, Any]
MS = 1000.0


def event(name: str, kind: str, start: float, end: float, thread: int = 1) -> Event:
    """From and to in milliseconds."""
    ts, dur = start * MS, (end - start) * MS
    return {"ph": "X", "name": name, "cat": kind, "pid": 1, "tid": thread, "ts": ts, "dur": dur}


def step(number: int, start: float, end: float) -> Event:
    return event(f"ProfilerStep#{number}", "user_annotation", start, end)


def on_gpu() -> list[Event]:
    """Two steps of 100 ms each; the first has everything."""
    return [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
        step(4, 0, 100),
        step(5, 100, 200),
        event("kinema/data", "user_annotation", 0, 20),
        event("kinema/forward", "user_annotation", 20, 100),
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 15, 25, thread=7),
        event("Memset (Device)", "gpu_memset", 25, 30, thread=7),
        event("sm90_xmma_gemm_bf16bf16_bf16f32", "kernel", 30, 60, thread=7),
        # Half of it is hidden behind the kernel.
        event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "kernel", 50, 70,
              thread=20),
        # Launches are work of the host, collectives among them.
        event("c10d::_allgather_base_", "cpu_op", 28, 29),
        event("aten::addmm", "cpu_op", 20, 80),
        event("cudaLaunchKernel", "cuda_runtime", 40, 50),
        event("void at::native::elementwise_kernel", "kernel", 100, 200, thread=7),
        event("aten::mul", "cpu_op", 210, 220),  # after the last step
    ]  # fmt: skip


def test_every_moment_of_a_step_counts_once() -> None:
    found = break_down(on_gpu())
    assert found.steps == 2
    assert found.gpu
    assert found.total == pytest.approx(0.2)
    milliseconds = {row: 1000 * seconds for row, seconds in found.rows.items()}
    assert milliseconds == pytest.approx(
        {
            "kernel": 130.0,
            "communication": 10.0,
            "memory copy": 10.0,
            "memory set": 5.0,
            "loader": 15.0,  # of 20: in the last 5 something was copied already
            "CPU": 10.0,  # from 70 to 80
            "other": 20.0,
        }
    )
    assert sum(found.rows.values()) == pytest.approx(found.total)
    assert 1000 * found.busy["communication"] == pytest.approx(20.0)
    assert 1000 * found.busy["CPU"] == pytest.approx(60.0)


def test_the_hosts_own_time_leaves_out_what_is_inside() -> None:
    found = break_down(on_gpu())
    assert {name: 1000 * seconds for name, seconds in found.spans.items()} == pytest.approx(
        {"forward": 80.0, "data": 20.0}
    )
    assert {name: 1000 * seconds for name, seconds in found.operators.items()} == pytest.approx(
        {"aten::addmm": 49.0, "cudaLaunchKernel": 10.0, "c10d::_allgather_base_": 1.0}
    )


def test_what_reaches_beyond_its_step_or_its_caller_is_cut() -> None:
    found = break_down(
        [
            step(1, 0, 100),
            event("kinema/forward", "user_annotation", 90, 130),
            event("aten::outer", "cpu_op", 10, 20),
            event("aten::inner", "cpu_op", 15, 25),  # clocks are read one after the other
        ]
    )
    assert {name: 1000 * seconds for name, seconds in found.spans.items()} == pytest.approx(
        {"forward": 10.0}
    )
    assert {name: 1000 * seconds for name, seconds in found.operators.items()} == pytest.approx(
        {"aten::inner": 10.0, "aten::outer": 5.0}
    )


def test_without_a_gpu_collectives_and_copies_of_the_host_count() -> None:
    found = break_down(
        [
            step(1, 0, 100),
            event("aten::linear", "cpu_op", 0, 60),
            event("aten::copy_", "cpu_op", 10, 20),
            event("aten::zero_", "cpu_op", 20, 25),
            event("gloo:all_reduce", "user_annotation", 50, 80, thread=9),
        ]
    )
    assert not found.gpu
    assert {row: round(1000 * seconds) for row, seconds in found.rows.items()} == {
        "kernel": 0,
        "communication": 30,
        "memory copy": 10,
        "memory set": 5,
        "loader": 0,
        "CPU": 35,
        "other": 20,
    }


def shares(gpu: bool = True, **percent: float) -> Breakdown:
    """A step of 100 s; what is not named is other."""
    names = {"copy": "memory copy", "fill": "memory set", "cpu": "CPU"}
    rows = dict.fromkeys(("kernel", "communication", "memory copy", "memory set", "loader"), 0.0)
    rows |= {"CPU": 0.0, "other": 0.0}
    rows |= {names.get(key, key): value for key, value in percent.items()}
    return Breakdown(1, 100.0, rows, dict(rows), {"forward": 50.0}, {"aten::mm": 20.0}, gpu)


def test_advice_follows_the_largest_losses() -> None:
    def said(found: Breakdown, **facts: Any) -> str:
        return " ".join(advise(found, Facts(**facts)))

    loader = said(shares(loader=30.0, kernel=70.0), workers=4)
    assert "30%" in loader
    assert "data.num_workers is 4" in loader
    assert "latent_cache" in loader
    assert "latent_cache" not in said(shares(loader=30.0), latents_cached=True)

    exposed = shares(communication=25.0, kernel=75.0)
    assert "zero2" in said(exposed, shard="zero3")
    assert "shard_over: node" in said(exposed, shard="zero3")
    assert "shard_over" not in said(exposed, shard="zero3", hybrid=True)
    assert "shard_over: node" in said(exposed, shard="zero2")
    assert "shard_over" not in said(exposed, shard="zero2", hybrid=True)
    assert "accumulation" in said(exposed, shard="none")

    waiting = shares(kernel=60.0, cpu=30.0, other=10.0)
    assert "compile: true" in said(waiting)
    assert "compile" not in said(waiting, compile=True)
    assert "micro-batches" in said(waiting, compile=True)
    assert "host" not in said(shares(gpu=False, cpu=90.0, other=10.0))

    assert "Copies take 8%" in said(shares(copy=8.0, kernel=80.0))
    assert "zeroing gradients" in said(shares(fill=6.0, kernel=80.0))
    assert "recompute less" in said(shares(kernel=90.0), recompute="full")
    assert "recompute" not in said(shares(kernel=90.0))
    assert said(shares(kernel=80.0, cpu=10.0)) == "No share stands out."


def test_the_table_as_a_person_reads_it() -> None:
    lines = render(break_down(on_gpu()), Facts()).splitlines()
    assert lines[0] == "2 steps of 0.1 s; seconds are those of one step"
    assert "kernel             0.0650       65.0%    0.0650" in lines
    assert "communication      0.0050        5.0%    0.0100" in lines
    assert any(line.startswith("forward") and "40.0%" in line for line in lines)
    assert any(line.startswith("aten::addmm") for line in lines)
    assert lines[-2] == "what to try next:" or lines[-3] == "what to try next:"
    assert max(map(len, lines)) <= 130


def test_a_compressed_trace_is_read(tmp_path: Path) -> None:
    text = json.dumps({"schemaVersion": 1, "traceEvents": on_gpu()})
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(text)
    assert read_trace(tmp_path / "a.json.gz") == read_trace(tmp_path / "a.json") == on_gpu()


def test_intervals() -> None:
    assert union([(3, 4), (0, 1), (1, 2), (0.5, 0.6), (5, 5)]) == [(0, 2), (3, 4)]
    assert intersect([(0, 2), (3, 6)], [(1, 4), (5, 9)]) == [(1, 2), (3, 4), (5, 6)]
