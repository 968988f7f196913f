"""`kinema cluster top` and `health` against real ssh servers; only the hardware is a stand-in."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kinema.cluster import bandwidth, health_report
from kinema.cluster.clocks import measure
from kinema.cluster.health import Examiner, Wanted
from kinema.cluster.plan import Node
from kinema.cluster.rounds import Rounds
from kinema.cluster.ssh import Problem
from kinema.cluster.top import Watch
from kinema.cluster.verdict import Limits
from tests.integration.cluster_fixtures import BIN, Cluster, loopback, needs_sshd
from tests.unit.cluster import hardware
from tests.unit.cluster.hardware import Hardware, app_row, gpu_row, rows_row

pytestmark = needs_sshd

AHEAD_S = 3.2
CALM = [f"--limit={name}=0" for name in ("disk_warning_gib", "disk_error_gib", "open_files")]
CALM += ["--limit=locked_memory_gib=0"]
CALM += ["--limit=shared_memory_warning_gib=0", "--limit=latency_warning_ms=1e6"]
CALM += ["--limit=skew_warning_ms=1000", "--limit=skew_error_ms=2000"]  # this machine may be busy


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hardware]:
    """One node that is well, and three that are not, each in its own way."""
    folder = tmp_path_factory.mktemp("hardware")
    other = folder / "other-torch/torch-2.11.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    made = {name: Hardware(folder / name) for name in ("good", "broken", "skewed", "odd")}
    for one in made.values():
        one.gpus = [gpu_row(0), gpu_row(1)]
        one.rows = [rows_row(0), rows_row(1)]
        one.nvlink = hardware.NVLINK.format(link="26.562 GB/s")
        one.nvlink_errors = hardware.NVLINK_QUIET
        one.variables = {"GLOO_SOCKET_IFNAME": "lo"}
    made["broken"].log = hardware.XID_79
    made["broken"].gpus[1]["ecc.errors.uncorrected.volatile.total"] = 3
    made["skewed"].clock_s = AHEAD_S
    made["skewed"].leap = "Not synchronised"
    made["odd"].rate = "200 Gb/sec (4X HDR)"
    made["odd"].variables["PYTHONPATH"] = str(other.parent)
    return {name: one.write() for name, one in made.items()}


@pytest.fixture(scope="module")
def cluster(
    nodes: dict[str, Hardware], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    environment = {name: one.environment for name, one in nodes.items()}
    folder = tmp_path_factory.mktemp("cluster")
    with loopback(folder, *nodes, environment=environment) as cluster:
        yield cluster


def not_ok(node: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in node["checks"] if check["status"] != "ok"}


def test_each_fault_is_named_with_its_node_and_cure(cluster: Cluster) -> None:
    weights = cluster.folder / "model.safetensors"
    weights.write_bytes(b"w" * 1000)
    done = cluster.kinema("health", "--quick", "--json", "--weights", str(weights), *CALM)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "error"
    good, broken, skewed, odd = (found["nodes"][name] for name in cluster.names)
    assert not_ok(good) == {}
    assert good["verdict"] == "ok"

    wrong = not_ok(broken)
    assert set(wrong) == {"gpu xid 0000:3b:00 79", "gpu 1 ecc"}
    assert "fallen off the bus" in wrong["gpu xid 0000:3b:00 79"]["value"]
    assert "1.0 h ago" in wrong["gpu xid 0000:3b:00 79"]["value"]
    assert "power it off and on" in wrong["gpu xid 0000:3b:00 79"]["cure"]
    assert wrong["gpu 1 ecc"]["value"].startswith("3 uncorrected memory errors")
    assert "--gpu-reset -i 1" in wrong["gpu 1 ecc"]["cure"]

    wrong = not_ok(skewed)
    assert set(wrong) == {"clock", "time synchronisation"}
    assert wrong["clock"]["status"] == "error"
    assert "ahead of" in wrong["clock"]["value"]
    assert 3000 < float(wrong["clock"]["value"].split()[0].replace(",", "")) < 3400
    assert "makestep" in wrong["clock"]["cure"]
    assert "Not synchronised" in wrong["time synchronisation"]["value"]

    wrong = not_ok(odd)
    assert set(wrong) == {"infiniband mlx5_0:1 rate", "torch"}
    assert wrong["infiniband mlx5_0:1 rate"]["value"] == "200 Gb/s"
    assert wrong["infiniband mlx5_0:1 rate"]["limit"].startswith("400 Gb/s as on good")
    assert wrong["torch"]["value"] == "2.11.0"
    assert wrong["torch"]["cure"] == "kinema cluster setup"

    values = {c["name"]: c["value"] for c in good["checks"]}
    assert values[f"weights {weights}"].startswith("1,000 bytes, sha256 ")
    assert values["gpus"] == "2 × NVIDIA H100 80GB HBM3"
    assert "nvidia_peermem" in values["gpudirect"]


def test_a_node_that_is_well_passes_strictly_and_an_unknown_limit_does_not(
    cluster: Cluster,
) -> None:
    done = cluster.kinema("health", "--quick", "--strict", "--include", "good", *CALM)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].split()[:2] == ["good", "ok"]
    done = cluster.kinema("health", "--quick", "--limit", "skew=1")
    assert done.returncode == 1
    assert "skew_error_ms" in done.stderr


def test_clocks_are_measured_within_their_stated_bound(cluster: Cluster) -> None:
    found = dict(zip(cluster.names, measure(cluster.ssh, cluster.hosts), strict=True))
    for name, clock in found.items():
        assert not isinstance(clock, Problem)
        truth = AHEAD_S if name == "skewed" else 0.0
        assert abs(clock.offset_s - truth) <= clock.bound_s
        assert clock.bound_s > 0


def test_bandwidth_is_measured_over_all_and_in_pairs(cluster: Cluster) -> None:
    done = cluster.kinema(
        *("health", "--json", "--sizes", "4K,64K", *CALM),
        *("--limit", "bandwidth_part=0", "--time-limit", "150"),
        timeout=280,
    )
    found = json.loads(done.stdout)
    whole, without = found["together"]
    assert whole["name"] == "bandwidth"
    assert whole["status"] == "ok", whole
    assert "at 64 KiB, 3 processes on 3 nodes (gloo)" in whole["value"]
    assert without["value"].startswith("measured without odd:")
    for name in ("good", "broken", "skewed"):
        node = found["nodes"][name]
        (pair,) = [c for c in node["checks"] if c["name"] == "bandwidth in pairs"]
        assert float(pair["value"].split()[0]) >= 0
    assert not still_running(cluster.folder)


def test_why_nothing_was_measured_is_said(cluster: Cluster, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *"-m torch.distributed.run"*)'
        f' echo "ImportError: torch is broken here"; exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    test = bandwidth.Test(str(python), str(cluster.folder), {}, timeout_s=60)
    parts = [Node(host, 1) for host in cluster.hosts[:2]]
    found = bandwidth.examine(parts, bandwidth.over_ssh(cluster.ssh, test), Limits())
    assert set(found) == {""}, "of two nodes none can be blamed"
    assert "ImportError: torch is broken here" in found[""][0].value
    assert not still_running(cluster.folder)


def still_running(folder: Path) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:  # another's, or ended
            continue
    return found


def test_rounds_keep_a_history_and_tell_of_a_drop_once(
    cluster: Cluster, nodes: dict[str, Hardware], tmp_path: Path
) -> None:
    run = tmp_path / "000-run"
    run.mkdir()
    test = bandwidth.Test(sys.executable, str(tmp_path), {})
    wanted = Wanted(str(tmp_path), sys.executable, (), test=test)
    hosts = [host for host in cluster.hosts if host.name == "good"]
    examiner = Examiner(cluster.ssh, hosts, wanted)
    lines: list[str] = []
    nodes["good"].apps = [app_row(1)]
    nodes["good"].write()
    first = examiner.quick()
    slow = examiner.slow(first)
    (left_out,) = slow.together
    assert left_out.status == "warning"
    assert left_out.value == "not measured: programs run on GPUs of good"
    rounds = Rounds(examiner, first, slow, tmp_path / "history.jsonl", run, tell=lines.append)
    rounds.round()
    assert lines == []
    nodes["good"].rate = "200 Gb/sec (4X HDR)"
    nodes["good"].link_downed = 4
    nodes["good"].log = hardware.XID_79
    nodes["good"].write()
    try:
        rounds.round()
        told = list(lines)
        rounds.round()
    finally:
        nodes["good"].rate, nodes["good"].link_downed = "400 Gb/sec (4X NDR)", 0
        nodes["good"].log, nodes["good"].apps = "", []
        nodes["good"].write()
    assert lines == told, "each change is told once"
    assert any("link rate fell to 200 Gb/s from 400 Gb/s" in line for line in told)
    assert any("errors grow: 4, before 0" in line for line in told)
    assert any("ok -> error: gpu xid 0000:3b:00 79" in line for line in told)

    records = [json.loads(line) for line in (tmp_path / "history.jsonl").open()]
    rates = [record["readings"]["infiniband/mlx5_0:1/rate_gbit_s"] for record in records]
    assert rates == [400, 400, 200, 200]
    assert {record["node"] for record in records} == {"good"}
    assert records[0]["readings"]["gpu0/power_w"] == 652.31

    events = [json.loads(line) for line in (run / "events.jsonl").open()]
    kept = [event["nodes"]["good"] for event in events if event["event"] == "cluster health"]
    assert [one["rate_gbit_s"] for one in kept] == [400, 400, 200, 200]
    assert kept[0]["power_w"] == 652.3
    changed = [event["what"] for event in events if event["event"] == "cluster health changed"]
    assert changed == [line.split("  ", 1)[1] for line in told]


def test_every_goes_on_for_as_long_as_it_is_told(cluster: Cluster) -> None:
    done = cluster.kinema(
        *("health", "--quick", "--include", "good", "--every", "1s", "--for", "1s"),
        *("--history", "kept.jsonl", *CALM),
    )
    assert done.returncode == 0, done.stderr
    assert len((cluster.folder / "kept.jsonl").read_text().splitlines()) == 2


def test_top_shows_gpus_and_whose_processes_they_run(
    cluster: Cluster, nodes: dict[str, Hardware], tmp_path: Path
) -> None:
    training = tmp_path / "kinema"  # a process by that name, which trains nothing
    training.write_text("import time; time.sleep(300)")
    environment = {**os.environ, "RANK": "5", "KINEMA_LAUNCH": "try-1"}
    environment["KINEMA_LAUNCH_HOST"] = "good"
    ours = subprocess.Popen([sys.executable, str(training), "train", "tiny/x"], env=environment)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    nodes["good"].apps = [app_row(ours.pid, 0), app_row(other.pid, 1, "[N/A]")]
    nodes["good"].write()
    nodes["broken"].broken = "Unable to determine the device handle for GPU0000:3B:00.0: Unknown"
    nodes["broken"].write()
    try:
        done = cluster.kinema("top", "--once", "--json")
        by_gpu = cluster.kinema("top", "--once", "--gpus", "--include", "good").stdout
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()
        nodes["broken"].broken = ""
        nodes["broken"].write()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    shown = {node["name"]: node for node in found["nodes"]}
    assert found["gpus"] == 6
    assert found["total_power_w"] == pytest.approx(6 * 652.31)
    good = shown["good"]
    assert good["mean_power_w"] == pytest.approx(652.31)
    assert good["gpus"][0]["throttle"] == ["power cap"]
    assert good["load"] == 3.5
    assert (good["memory_total"], good["memory_used"]) == (1024_000, 768_000)
    first, second = (p for p in good["processes"] if p["gpu"] is not None)
    assert (first["pid"], first["gpu"], first["rank"], first["ours"]) == (ours.pid, 0, 5, True)
    assert (first["launch"], first["recipe"]) == ("try-1", "tiny/x")
    assert first["gpu_memory"] == 70000 * 2**20
    assert (second["pid"], second["gpu"], second["ours"]) == (other.pid, 1, False)
    assert second["gpu_memory"] is None
    assert "Unable to determine the device handle" in shown["broken"]["note"]
    assert not [p for p in shown["skewed"]["processes"] if p["pid"] == ours.pid]
    rows = [line for line in by_gpu.splitlines() if line.startswith("good")]
    assert [row.split()[1] for row in rows[:2]] == ["0", "1"]
    assert "rank 5 of tiny/x" in rows[0]


def test_a_node_that_hangs_holds_up_no_other(cluster: Cluster, nodes: dict[str, Hardware]) -> None:
    hosts = [host for host in cluster.hosts if host.name in ("good", "odd")]
    with Watch(cluster.ssh, hosts, stale_s=1.0) as watch:
        watch.follow(every_s=0.1)
        until(lambda: all(node.note is None for node in watch.latest()))
        nodes["odd"].hangs = True
        nodes["odd"].write()
        nodes["good"].gpus[0]["power.draw"] = "111.00"
        nodes["good"].write()
        try:
            until(lambda: "no answer for" in (watch.latest()[1].note or ""))
            until(lambda: watch.latest()[0].gpus[0].power_w == 111)
            assert watch.latest()[0].note is None
            assert watch.latest()[1].gpus  # what was last known
        finally:
            nodes["odd"].hangs, nodes["good"].gpus[0]["power.draw"] = False, "652.31"
            for name in ("good", "odd"):
                nodes[name].write()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something; fails only if it never comes."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_node_that_goes_away_is_said_to(cluster: Cluster, nodes: dict[str, Hardware]) -> None:
    with Watch(cluster.ssh, cluster.hosts[:2], timeout_s=30) as watch:
        assert [node.problem for node in watch.read()] == [None, None]
        cluster.stop("broken")
        line = watch._sessions["broken"]._process  # as when the network breaks
        line.kill()
        good, gone = watch.read()
        assert good.problem is None
        assert gone.problem
        again = watch.read()[1]  # the connection is not tried anew at once
        assert again.problem == gone.problem
    examiner = Examiner(cluster.ssh, cluster.hosts[:2], Wanted("/", sys.executable, ()))
    found = examiner.quick()
    (check,) = found.nodes["broken"]
    assert (check.name, check.status) == ("connection", "error")
    assert "no ssh server answers there" in check.value
    assert "start sshd" in health_report.report(found, verbose=False)


def test_the_live_view_is_drawn_and_ends_with_ctrl_c(cluster: Cluster) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
    view = subprocess.Popen(
        [str(BIN / "kinema"), "cluster", "top", "--include", "good", "--every", "0.5"],
        cwd=cluster.folder,
        env=cluster.environment() | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    screen = b""

    def more() -> bytes:
        assert select.select([ours], [], [], 120)[0], screen
        return os.read(ours, 1 << 16)

    try:
        while screen.count(b"652 W a GPU") < 2:  # drawn, and drawn again
            screen += more()
        view.send_signal(signal.SIGINT)
        while True:
            screen += more()
    except OSError:  # the terminal's other end is closed: it has ended
        pass
    finally:
        os.close(ours)
        view.kill()
    assert view.wait() == 0
    assert b"Traceback" not in screen
