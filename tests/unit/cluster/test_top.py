"""The table of `top`: what it shows, what comes first, how it fits."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from kinema.cluster import gpu, top_table
from kinema.cluster.top import NodeUse, as_dict, understand
from tests.unit.cluster.hardware import app_row, csv, gpu_row


def process(pid: int, **changes: Any) -> dict[str, Any]:
    usual = {
        "pid": pid,
        "parent": 1,
        "user": "ann",
        "command": "/usr/bin/python3 /env/bin/kinema train speedrun/stage1",
        "training": True,
        "helper": False,
        "rank": pid,
        "launch": "l1",
        "host": None,
        "run": "/w/outputs/003-STDiT3",
        "recipe": "speedrun/stage1",
        "memory": 8 * 2**30,
        "cpu_percent": 50.0,
    }
    return usual | changes


def said(*rows: dict[str, object], **changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "gpu": csv(list(rows), gpu.names(gpu.USE_FIELDS)),
        "apps": csv([app_row(int(str(row["index"])), int(str(row["index"]))) for row in rows],
                    gpu.app_names()),
        "listing": "",
        "load": 12.0,
        "cores": 64,
        "cpu_percent": 20.0,
        "memory": [2**40, 2**38],
        "processes": [process(int(str(row["index"]))) for row in rows],
    }  # fmt: skip
    return usual | changes


def shown(nodes: list[NodeUse], width: int = 100, **how: Any) -> list[str]:
    options: dict[str, Any] = {"by_gpu": False, "sort": "worst", **how}
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    console.print(top_table.render(nodes, width=width, **options))
    return out.getvalue().splitlines()


@pytest.fixture
def nodes() -> list[NodeUse]:
    """24 nodes of 8 GPUs; one is slowed, one idle, one gone."""
    made = []
    for number in range(24):
        changes: dict[str, Any] = {}
        if number == 7:
            changes = {"clocks_event_reasons__active": "0x80", "clocks__sm": 345}
        if number == 11:
            changes = {"utilization__gpu": 0}
        made.append(
            understand(f"gpu{number:02d}", said(*(gpu_row(i, **changes) for i in range(8))))
        )
    made[3] = NodeUse("gpu03", problem="does not answer; is it switched on?")
    return made


def test_one_line_a_node_with_the_worst_first(nodes: list[NodeUse]) -> None:
    lines = shown(nodes)
    assert len(lines) == 1 + 24 + 1 + 2  # the line on all nodes is folded
    assert lines[1].startswith("gpu03")
    assert "does not answer" in lines[1]
    assert lines[2].startswith("gpu07")
    assert "power brake (GPU 0,1,2" in lines[2]
    assert lines[3].startswith("gpu11")
    assert " 0 %" in lines[3]
    assert lines[4].startswith("gpu00")
    assert "8 ranks of speedrun" in lines[4]
    assert "652" in lines[4]
    assert "5.2 kW" in lines[4]
    assert all(len(line) <= 100 for line in lines)
    assert lines[-2].startswith("24 nodes, 184 GPUs; 120.0 kW in all, 5.2 kW a node, 652 W a GPU")


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 160])
@pytest.mark.parametrize("by_gpu", [False, True])
def test_it_fits_any_width(nodes: list[NodeUse], width: int, by_gpu: bool) -> None:
    lines = shown(nodes, width, by_gpu=by_gpu)
    assert all(len(line) <= width for line in lines)
    assert any(line.startswith("gpu00") for line in lines)


def test_one_line_a_gpu(nodes: list[NodeUse]) -> None:
    lines = shown(nodes, 140, by_gpu=True, sort="name")
    assert sum(line.startswith("gpu00") for line in lines) == 8
    row = next(line for line in lines if line.startswith("gpu00"))
    assert "rank 0 of speedrun/stage1 (003-STDiT3), ann 0, 68.4 GiB" in row
    assert len(shown(nodes, 140, by_gpu=True, sort="name", most_rows=10)) == 1 + 10 + 1 + 2


def test_orders(nodes: list[NodeUse]) -> None:
    def first(sort: Any) -> str:
        return top_table.arrange(nodes, sort)[0].name

    assert [first("worst"), first("name"), first("utilisation")] == ["gpu03", "gpu00", "gpu03"]
    hot = understand("hot", said(gpu_row(0, temperature__gpu=99, power__draw=9999)))
    nodes.append(hot)
    assert [first("temperature"), first("power")] == ["hot", "hot"]
    full = understand("full", said(*(gpu_row(i, memory__used=81559) for i in range(8))))
    nodes.append(full)
    assert first("memory") == "full"


def test_a_cluster_without_gpus_shows_cpus() -> None:
    missing = {"text": "", "problem": "not installed", "fields": []}
    trains = [process(100, rank=0), process(101, rank=1)]
    helpers = [process(102, rank=1, helper=True)]
    one = understand("cpu", said(gpu=missing, apps=missing, processes=trains + helpers))
    header, row, *_ = shown([one])
    assert "GPUs" not in header
    assert "20 %" in row
    assert "12.0" in row
    assert "256/1024G" in row
    assert "2 ranks of speedrun/stage1" in row
    assert as_dict([one])["total_power_w"] is None


def test_what_cannot_be_read_is_said() -> None:
    one = understand("odd", said(gpu=csv([], gpu.names(gpu.USE_FIELDS)) | {"text": "what?"}))
    assert "could not be read: 'what?'" in shown([one], 140)[1]
    failed = {"text": "", "problem": "did not answer within 20 s", "fields": []}
    lost = understand("lost", said(gpu=failed, apps=failed))
    assert "nvidia-smi did not answer within 20 s" in shown([lost], 140)[1]


def test_processes_of_others_are_told_apart() -> None:
    found = said(gpu_row(0), gpu_row(1))
    found["processes"][1] = process(
        1, training=False, user="bob", command="/usr/bin/python3 -u mine.py", rank=None
    )
    row = shown([understand("n", found)], 140)[1]
    assert "1 rank of speedrun/stage1" in row
    assert "bob: python3 mine.py" in row
    unseen = understand("n", said(gpu_row(0), processes=[]))  # in a container of its own
    assert unseen.processes[0].user == "?"
    assert unseen.processes[0].command == "/usr/bin/python3"


def test_without_utilisation_nothing_is_worst() -> None:
    sliced = [
        understand(name, said(gpu_row(0, utilization__gpu="[N/A]", power__draw="[N/A]")))
        for name in "ab"
    ]
    lines = shown(sliced)
    assert lines[1].startswith("a")
    assert " - " in lines[1]
    assert as_dict(sliced)["mean_power_w"] is None
