"""What nvidia-smi says, as values; unknown output is said to be so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kinema.cluster import gpu, xid
from kinema.cluster.gpu import UnreadableError
from kinema.cluster.on_node import machine, nvidia
from tests.unit.cluster import hardware
from tests.unit.cluster.hardware import Hardware, app_row, csv, gpu_row

GPU_FIELDS = gpu.names(gpu.HEALTH_FIELDS)


def test_a_healthy_gpu() -> None:
    (one,) = gpu.gpus(csv([gpu_row(3)], GPU_FIELDS))
    assert (one.index, one.name) == (3, "NVIDIA H100 80GB HBM3")
    assert one.memory_total == 81559 * 2**20
    assert one.power_w == 652.31
    assert one.throttle == ("power cap",)
    assert one.slowed == ()
    assert one.broken is None


@pytest.mark.parametrize("said", ["[N/A]", "N/A", "[Not Supported]", "[Insufficient Permissions]"])
def test_what_a_gpu_does_not_say_is_none(said: str) -> None:
    (one,) = gpu.gpus(csv([gpu_row(utilization__gpu=said, power__draw=said)], GPU_FIELDS))
    assert one.utilisation_percent is None
    assert one.power_w is None
    assert one.memory_used is not None
    assert one.broken is None


@pytest.mark.parametrize("said", ["ERR!", "[GPU requires reset]", "[Unknown Error]"])
def test_a_gpu_in_trouble_is_noticed(said: str) -> None:
    (one,) = gpu.gpus(csv([gpu_row(power__draw=said)], GPU_FIELDS))
    assert one.broken == said.strip("[]")


@pytest.mark.parametrize("text", ["0, GPU-0", "Segmentation fault", "a, b, c, d, e, f, g, h, i"])
def test_output_that_nobody_knows_is_quoted(text: str) -> None:
    said = csv([], GPU_FIELDS) | {"text": text}
    with pytest.raises(UnreadableError, match="could not be read: "):
        gpu.gpus(said)


def test_reasons_for_a_low_clock() -> None:
    assert gpu.throttle("0x0000000000000001") == ("idle",)
    assert gpu.throttle("0x00000000000000C8") == (
        *("hardware slowdown", "hardware thermal slowdown", "power brake"),
    )
    assert gpu.throttle("0x0000000000002000") == ("reason 0x2000",)
    assert gpu.throttle("[N/A]") == ()
    with pytest.raises(UnreadableError):
        gpu.throttle("Active")


def test_processes_with_commas_in_their_names_and_on_slices() -> None:
    fields = gpu.app_names()
    slice_of_0 = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"
    rows = [
        app_row(10) | {"process_name": "python -c a, b"},
        app_row(11, memory="[N/A]") | {"gpu_uuid": slice_of_0},
    ]
    first, second = gpu.apps(csv(rows, fields), hardware.LISTING_WITH_MIG)
    assert (first.pid, first.name, first.memory) == (10, "python -c a, b", 70000 * 2**20)
    assert second.uuid == "GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"
    assert second.memory is None
    empty = csv([], fields) | {"text": "No running processes found\n"}
    assert gpu.apps(empty, "") == []


def test_nvlinks_and_their_errors() -> None:
    links = gpu.nvlinks(hardware.NVLINK.format(link="<inactive>"))
    assert links == {0: [26.562, 26.562], 1: [26.562, None]}
    assert gpu.nvlink_errors(hardware.NVLINK_ERRORS) == {0: 0, 1: 7}
    with pytest.raises(UnreadableError):
        gpu.nvlinks(hardware.NVLINK.format(link="fast"))


def test_xids_of_both_logs() -> None:
    fallen, fault = xid.read(hardware.XID_79 + "noise\n" + hardware.XID_31_IN_JOURNAL)
    assert (fallen.number, fallen.device, fallen.at_s) == (79, "0000:3b:00", 4200.123456)
    assert fallen.meaning.hardware
    assert (fault.number, fault.device, fault.at_s) == (31, "0000:86:00", 100.000001)
    assert not fault.meaning.hardware
    assert "MMU Fault" in fault.text
    assert xid.PAGE in xid.Xid(999, "x", None, "").meaning.cure


@pytest.mark.parametrize("number", [13, 31, 43, 45, 48, 61, 62, 63, 64, 74, 79, 94, 95, 119])
def test_frequent_xids_are_in_the_table(number: int) -> None:
    meaning = xid.MEANINGS[number]
    assert meaning.what
    assert meaning.cure


def test_a_field_that_a_driver_does_not_know_is_asked_for_by_its_old_name_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Hardware(tmp_path, gpus=[gpu_row()]).write()
    for name, value in node.environment.items():
        monkeypatch.setenv(name, value)
    fields = [["index"], ["of.a.later.driver"], gpu.THROTTLE]
    said = nvidia.query("gpu", fields)
    assert said["fields"] == ["index", gpu.THROTTLE[0]]
    assert said["text"] == "0, 0x0000000000000004\n"
    assert said["problem"] is None


def test_tools_that_are_missing_fail_or_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "MORE_FOLDERS", ("/bin", "/usr/bin"))

    def tool(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    tool("fails", "echo said; echo 'why it fails' >&2; exit 9")
    tool("hangs", "exec /bin/sleep 30")
    assert machine.run("no-such-tool")["problem"] == "not installed"
    failed: dict[str, Any] = machine.run("fails")
    assert failed == {"text": "said\n", "problem": "ended with code 9: why it fails"}
    assert machine.run("hangs", timeout_s=0.2)["problem"] == "did not answer within 0.2 s"
