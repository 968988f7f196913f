"""`kinema cluster launch`, `stacks` and `kill` over real ssh servers on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kinema.checkpoint.run import Checkpoint
from kinema.cluster.on_node.processes import HOST_MARK, MARK, find
from tests.integration.cluster_fixtures import BIN, Cluster, loopback, needs_sshd
from tests.integration.train_fixtures import write_clips

pytestmark = needs_sshd

STUB = """
import os, signal, subprocess, sys, time
rank, mode = int(os.environ["RANK"]), os.environ["STUB"]
print("rank", rank, "of", os.environ["WORLD_SIZE"], "is here", flush=True)
if mode == "fail" and rank == 1:
    print("no clip at all", file=sys.stderr)
    sys.exit(3)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                          start_new_session=True)
print("waiting", flush=True)
time.sleep(600)
"""
"""Plays `kinema train`: a rank with a helper that outlives it."""


TORCHRUN = """
import os, subprocess, sys
rank = "0" if "--rdzv-conf=is_host=true" in sys.argv else "1"
environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
program = sys.argv[sys.argv.index("--no-python") + 1:]
process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE)
for line in process.stdout:
    sys.stdout.buffer.write(f"[rank{rank}]: ".encode() + line)
    sys.stdout.flush()
sys.exit(process.wait())
"""
"""Plays torchrun where the test is not about it, without the seconds that importing torch takes."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), count=12)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with loopback(tmp_path_factory.mktemp("cluster"), "node1", "node2") as running:
        yield running


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `python` whose neighbour `kinema` is the stub."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "torchrun").write_text(TORCHRUN)
    (folder / "python").write_text(
        f'#!/bin/sh\n[ "$2$STUB" = torch.distributed.runalone ] && '
        f'exec {sys.executable} {folder}/torchrun "$@"\nexec {sys.executable} "$@"\n'
    )
    (folder / "kinema").write_text(f"#!{sys.executable}\n{STUB}")
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder / "python"


class Started:
    """A launch that runs beside the test; it and all that it started end with the block."""

    def __init__(self, cluster: Cluster, *words: str) -> None:
        self.process = subprocess.Popen(
            [str(BIN / "kinema"), "cluster", "launch", "--interface", "lo", *words],
            cwd=cluster.folder,
            env=cluster.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []
        assert self.process.stdout is not None
        self.lines = iter(self.process.stdout)

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        for process in marked(self.name) if self.name else ():
            os.kill(process["pid"], signal.SIGKILL)
        self.process.wait()

    @property
    def name(self) -> str:
        """Of the launch; other tests may run some at the same time."""
        return name_in("".join(self.said))

    def until(self, wanted: str) -> str:
        for line in self.lines:
            self.said.append(line)
            if re.search(wanted, line):
                return line
        raise AssertionError(f"never said {wanted!r}:\n{''.join(self.said)}")

    def finish(self) -> tuple[int, str]:
        self.said.extend(self.lines)
        return self.process.wait(60), "".join(self.said)


def name_in(text: str) -> str:
    match = re.search(r"^cluster: (\S+): 2 ranks on node1, node2;", text, re.MULTILINE)
    return match[1] if match else ""


def marked(name: str) -> list[dict[str, Any]]:
    """What runs on this machine with the mark of a launch."""
    return find("", [], name)


def nothing_is_left(name: str) -> None:
    assert name
    assert marked(name) == []


def all_ends(name: str) -> None:
    """Soon, on whatever machine; fails only if it never does."""
    deadline = time.monotonic() + 120
    while marked(name) and time.monotonic() < deadline:
        time.sleep(0.1)
    nothing_is_left(name)


def log_folder(cluster: Cluster, text: str) -> Path:
    match = re.search(r"all output is in (\S+)", text)
    assert match is not None, text
    return cluster.folder / match[1]


@pytest.mark.slow
def test_two_hosts_train_to_the_end(cluster: Cluster, manifest: Path, tmp_path: Path) -> None:
    done = cluster.kinema(
        *("launch", "--interface", "lo", "--env", "OMP_NUM_THREADS=1"),
        *("tiny/smoke", "--data-path", str(manifest), "--outputs", str(tmp_path / "runs")),
        *("--tracking.tensorboard", "false", "--log_every=2", "--device", "cpu"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on node1, node2; kinema 0.1.0" in done.stderr
    assert "step 4 |" in done.stdout
    assert done.stdout.count("finished | step 4") == 1  # rank 0 alone comes to the terminal
    run = tmp_path / "runs" / "000-smoke"
    assert Checkpoint.open(run).step == 4
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 4
    logs = list(log_folder(cluster, done.stderr).glob("*/rank0.log"))
    assert len(logs) == 1
    assert "finished | step 4" in logs[0].read_text()
    nothing_is_left(name_in(done.stderr))


@pytest.mark.slow
def test_stacks_kill_and_ctrl_c(cluster: Cluster, manifest: Path, tmp_path: Path) -> None:
    """A long run: its stacks are shown, `kill` asks and is refused, Ctrl-C ends it with a save."""
    # Training's own program, but not marked.
    words = [sys.executable, "-c", "import time; time.sleep(600)", "kinema", "train"]
    decoys = [subprocess.Popen(words)]
    options = ("--outputs", str(tmp_path / "runs"), "--max_steps=100000", "--epochs=100000")
    options += ("--tracking.tensorboard", "false", "--log_every=1", "--device", "cpu")
    try:
        with Started(
            cluster, "--env=OMP_NUM_THREADS=1", "tiny/smoke", "--data-path", str(manifest), *options
        ) as launch:
            launch.until(r"step 1 \|")
            only = ("--launch", launch.name)
            # Marked, but no training.
            shell = os.environ | {MARK: launch.name, HOST_MARK: "node1"}
            decoys.append(subprocess.Popen(["sleep", "600"], env=shell))
            shown = cluster.kinema("stacks", *only, "--raw", str(tmp_path / "raw"))
            assert "of 2 ranks: " in shown.stdout, shown.stdout + shown.stderr
            assert re.search(r"node1 rank [01]", shown.stdout)
            assert re.search(r"node2 rank [01]", shown.stdout)
            assert re.search(r"run \(.*training/loop.py:\d+\)", shown.stdout)
            assert len(list((tmp_path / "raw").glob("node*-rank-*.txt"))) == 2

            refused = cluster.kinema("kill", *only, stdin="n\n")
            assert refused.returncode == 1
            assert refused.stdout.count("torchrun") == 2
            assert "nothing was ended" in refused.stdout
            for decoy in decoys:
                assert f"{decoy.pid:>9}" not in refused.stdout
            assert launch.process.poll() is None

            launch.process.send_signal(signal.SIGINT)
            code, text = launch.finish()
            assert code == 130, text
            assert "stopped by SIGTERM" in text
            nothing_is_left(launch.name)
        assert Checkpoint.open(tmp_path / "runs" / "000-smoke").step >= 1
        assert [decoy.poll() for decoy in decoys] == [None, None]
    finally:
        for decoy in decoys:
            decoy.kill()
            decoy.wait()


def stubbed(cluster: Cluster, stub: Path, mode: str, *words: str) -> Started:
    options = ("--python", str(stub), "--env", f"STUB={mode}", "--max-restarts", "0")
    return Started(cluster, *options, *words, "tiny/smoke", "--data-path", str(stub))


def test_a_rank_that_fails_is_named_and_the_others_are_stopped(
    cluster: Cluster, stub: Path
) -> None:
    with stubbed(cluster, stub, "fail", "--logs", "elsewhere", "--at-once", "1") as launch:
        code, text = launch.finish()
        assert code == 1, text
        match = re.search(r"training failed on (node\d), rank 1 \(exit code 3\)", text)
        assert match is not None, text
        shown = text.partition("its last lines:\n")[2].partition("try:")[0]
        assert "    rank 1 of 2 is here\n" in shown
        assert "    no clip at all\n" in shown
        log = log_folder(cluster, text) / match[1] / "rank1.log"
        assert log.parents[2].name == "elsewhere"
        assert "no clip at all" in log.read_text()
        nothing_is_left(launch.name)


def test_a_second_ctrl_c_kills_what_does_not_listen(cluster: Cluster, stub: Path) -> None:
    with stubbed(cluster, stub, "stubborn") as launch:
        launch.until("waiting")
        launch.process.send_signal(signal.SIGINT)
        launch.until("finish their step")
        assert len([p for p in marked(launch.name) if p["kind"] == "rank"]) == 2
        launch.process.send_signal(signal.SIGINT)
        code, text = launch.finish()
        assert code == 130, text
        assert "killing all ranks" in text
        nothing_is_left(launch.name)


def test_kill_ends_all_that_belongs_to_a_launch(cluster: Cluster, stub: Path) -> None:
    with stubbed(cluster, stub, "patient") as launch:
        launch.until("waiting")
        done = cluster.kinema("kill", "--launch", launch.name, "--yes", "--grace", "5")
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"node2: [3-9] ended", done.stdout)
        assert "helper" in done.stdout
        assert launch.finish()[0] == 1
        nothing_is_left(launch.name)


def test_a_launch_ends_with_its_starter(cluster: Cluster, stub: Path) -> None:
    with stubbed(cluster, stub, "alone") as launch:
        launch.until("waiting")
        launch.process.kill()
        all_ends(launch.name)
        done = cluster.kinema("kill", "--launch", launch.name)
        assert "no training process of yours on 2 hosts" in done.stdout


def test_a_lost_connection_is_named_and_all_ends(cluster: Cluster, stub: Path) -> None:
    with stubbed(cluster, stub, "alone") as launch:
        launch.until("waiting")
        # The server's ends of this launch's connection to node2; nothing else is open now.
        for session in psutil.Process(cluster.servers["node2"].pid).children():
            session.kill()
        code, text = launch.finish()
        assert code == 1, text
        assert "cluster: node2 failed: stopping node1" in text
        assert "error: the connection to node2 is lost: " in text
        assert "kinema cluster kill" in text
        all_ends(launch.name)  # node2 notices by itself
