"""`kinema cluster sync` and `setup` over real ssh servers, with connections that break."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kinema.checkpoint.errors import CheckpointError
from kinema.checkpoint.run import Checkpoint, prune, save_checkpoint
from kinema.cluster.copy_out import copy_out
from kinema.cluster.follow import look_once
from kinema.cluster.hostfile import Host
from kinema.cluster.on_node.tree import STAGING
from kinema.cluster.ssh import Ssh
from tests.integration.cluster_fixtures import BIN, Cluster, loopback, needs_sshd

pytestmark = needs_sshd

PROXY = """
import os, socket, sys, threading
line = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
left = int(open(sys.argv[2]).read())
def pass_on(read, write):
    global left
    while block := read(65536):
        left -= len(block)
        if left < 0:
            os._exit(1)
        write(block)
threading.Thread(target=pass_on, args=(lambda n: os.read(0, n), line.sendall), daemon=True).start()
pass_on(line.recv, lambda block: os.write(1, block))
"""
"""A line to a server that breaks after so many bytes."""
ENDLESS = 10**12


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(f"home-{name}") for name in ("node1", "node2")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, homes: dict[str, Path]) -> Iterator[Cluster]:
    environment = {name: {"HOME": str(home)} for name, home in homes.items()}
    folder = tmp_path_factory.mktemp("cluster")
    with loopback(folder, *homes, environment=environment) as running:
        yield running


class Weak:
    """The way to node1 over a line that breaks."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        (folder / "proxy.py").write_text(PROXY)
        self.limit = folder / "limit"
        command = f"{sys.executable} {folder}/proxy.py {cluster.ports['node1']} {self.limit}"
        config = folder / "ssh_config"
        config.write_text(f"Host node1\n  ProxyCommand {command}\n{cluster.config.read_text()}")
        self.ssh = Ssh(config)

    def breaks_after(self, count: int) -> Ssh:
        self.limit.write_text(str(count))
        return self.ssh


@pytest.fixture
def weak(cluster: Cluster, tmp_path: Path) -> Weak:
    return Weak(cluster, tmp_path)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    (folder / "part").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "part" / "one.safetensors").write_bytes(os.urandom(8_000_000))
    (folder / "part" / "two.safetensors").write_bytes(os.urandom(1000))
    return folder


def same(one: Path, other: Path) -> bool:
    files = {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()}
    others = {p.relative_to(other): p.read_bytes() for p in other.rglob("*") if p.is_file()}
    return files == others


def test_weights_reach_all_nodes_and_then_only_what_differs(
    cluster: Cluster, homes: dict[str, Path], weights: Path
) -> None:
    done = cluster.kinema("sync", "weights", str(weights), "--into", "~/models/w")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("got 3 files, 8,001,002 bytes") == 2
    assert all(same(weights, home / "models/w") for home in homes.values())

    (homes["node2"] / "models/w/config.json").write_text("[]")
    (homes["node2"] / "models/w/old.safetensors").write_text("of another release")
    refused = copy_out(cluster.ssh, cluster.hosts, weights, "~/models/w")
    assert refused[0].problem is None
    assert "has 1 files that are not in" in str(refused[1].problem)
    assert "old.safetensors; another --into, or --delete" in str(refused[1].problem)
    for mark in (None, "of-a-package"):
        other = copy_out(cluster.ssh, cluster.hosts[1:], weights, "~/models/w", delete_with=mark)
        assert other[0].problem is not None
    assert (homes["node2"] / "models/w/config.json").read_text() == "[]"
    told = copy_out(cluster.ssh, cluster.hosts, weights, "~/models/w", dry_run=True, delete_with="")
    assert [(one.files, one.bytes) for one in told] == [(0, 0), (1, 2)]
    assert (homes["node2"] / "models/w/config.json").read_text() == "[]"
    copied = copy_out(cluster.ssh, cluster.hosts, weights, "~/models/w", delete_with="")
    assert [(one.files, one.bytes, one.problem) for one in copied] == [(0, 0, None), (1, 2, None)]
    assert all(same(weights, home / "models/w") for home in homes.values())
    assert [path.name for path in (homes["node2"] / "models").iterdir()] == ["w"]

    done = cluster.kinema("sync", "weights", str(weights / "config.json"), "--into", "~/models/w")
    assert done.returncode == 1
    assert "2 of 2 hosts did not get it" in done.stderr
    assert "is a folder there and a file here" in done.stderr

    # One place with two doors, as a home folder on the network: it is sent once.
    place = homes["node1"].parent / "shared"
    place.mkdir()
    done = cluster.kinema("sync", "weights", str(weights), "--into", str(place / "w"))
    assert done.returncode == 0, done.stderr
    assert "node1: got 3 files" in done.stdout
    assert "node2: shares the disk of node1" in done.stdout
    assert same(weights, place / "w")
    assert [path.name for path in place.iterdir()] == ["w"]


def test_a_broken_connection_leaves_nothing_half_and_is_taken_up(
    homes: dict[str, Path], weights: Path, weak: Weak
) -> None:
    place, host = homes["node1"] / "broken/w", Host("node1")
    (copied,) = copy_out(weak.breaks_after(3_000_000), [host], weights, "~/broken/w")
    assert copied.problem is not None
    assert not place.exists()
    hidden = place.with_name(f"{STAGING}w")
    begun = (hidden / "part/one.safetensors").stat().st_size
    assert 500_000 < begun < 3_000_000
    (copied,) = copy_out(weak.breaks_after(ENDLESS), [host], weights, "~/broken/w")
    assert copied.problem is None
    assert copied.bytes <= 8_001_002 - begun
    assert same(weights, place)
    assert not hidden.exists()


def test_what_arrived_damaged_is_refused_and_sent_again(
    cluster: Cluster, homes: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "one.pt"
    file.write_bytes(b"good" * 1000)
    hidden = homes["node1"] / f"{STAGING}one.pt"
    hidden.mkdir()
    (hidden / "file").write_bytes(b"bad!" * 10)
    first, second = (
        copy_out(cluster.ssh, cluster.hosts[:1], file, "~/one.pt")[0] for _ in range(2)
    )
    assert "arrived with other content" in str(first.problem)
    assert second.problem is None
    assert (homes["node1"] / "one.pt").read_bytes() == file.read_bytes()


def save(run: Path, step: int) -> Checkpoint:
    tensors = {"weight": torch.full((500_000,), float(step))}
    return save_checkpoint(
        run,
        0,
        step,
        model=tensors,
        ema=tensors,
        optimizer={"weight.exp_avg": torch.zeros(1000)},
        state={},
        components={},
        recipe="name: x\n",
    )


def test_a_run_is_followed_without_its_optimizer(
    cluster: Cluster, homes: dict[str, Path], tmp_path: Path, weak: Weak
) -> None:
    run, into, host = homes["node1"] / "runs/000-x", tmp_path / "here", Host("node1")
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    for step in (1, 2):
        save(run, step)
    (run / "epoch0-global_step3").mkdir()  # a save under way: no state.json yet
    said: list[str] = []

    # Each section has 2 MB; the line breaks in the newest one, which comes first.
    broken = look_once(
        weak.breaks_after(3_000_000), host, "~/runs/000-x", into, keep=None, say=said.append
    )
    assert broken.problem is not None
    assert not list(into.glob("epoch*"))
    begun = sum(p.stat().st_size for p in into.rglob("*.safetensors"))
    assert begun > 500_000
    result = look_once(
        weak.breaks_after(8_000_000 - begun + 500_000),
        *(host, "~/runs/000-x", into),
        keep=None,
        say=said.append,
    )
    assert result.problem is None  # the line held because what had arrived was not sent again
    assert [path.name for path in result.new] == ["epoch0-global_step2", "epoch0-global_step1"]
    assert said[0] == f"{into}/epoch0-global_step2 arrived"
    assert (into / "run.json").read_text() == "{}"
    copy = Checkpoint.open(into, sections=("model", "ema"))
    copy.verify(sections=("model", "ema"), hashes=True)
    assert copy.step == 2
    assert not list(into.rglob("optimizer"))
    with pytest.raises(CheckpointError, match="optimizer"):
        Checkpoint.open(into)

    (run / "epoch0-global_step3").rmdir()
    save(run, 4)
    done = cluster.kinema("sync", "run", "node1:~/runs/000-x", "--into", str(into), "--keep", "2")
    assert done.returncode == 0, done.stderr
    assert "epoch0-global_step4 arrived" in done.stdout
    assert "epoch0-global_step1 removed" in done.stdout
    assert sorted(path.name for path in into.glob("*epoch*")) == [
        "epoch0-global_step2",
        "epoch0-global_step4",
    ]
    prune(run, 1)  # what goes there stays here
    place = tmp_path / "hosts.txt"
    place.write_text("node1 user=nobody-of-that-name\n")
    words = ("sync", "run", "node1:~/runs/000-x", "--into", str(into))
    done = cluster.kinema(*words, "--hostfile", str(place))
    assert "refuses this user's key" in done.stderr
    done = cluster.kinema(*words)
    assert done.stdout == "nothing new\n"
    assert (into / "epoch0-global_step2").exists()


def test_following_goes_on_when_the_host_is_away(cluster: Cluster, tmp_path: Path) -> None:
    following = subprocess.Popen(
        [
            *(str(BIN / "kinema"), "cluster", "sync", "run", "node1:~/later"),
            *("--into", str(tmp_path / "later"), "--every", "0.2s"),
        ],
        env=cluster.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    assert following.stderr is not None
    try:
        assert "no such folder (trying again in 0.2s)" in following.stderr.readline()
        run = tmp_path / "made"
        run.mkdir()
        save(run, 7)
        home = cluster.ssh.run(cluster.hosts[0], ["printenv", "HOME"], timeout_s=20)
        run.rename(Path(home.stdout.decode().strip()) / "later")
        assert "epoch0-global_step7 arrived" in following.stdout.readline()
        following.send_signal(signal.SIGINT)
        following.communicate(timeout=30)
        assert following.returncode == 130
    finally:
        following.kill()
        following.wait()


BACKEND = """
import os, zipfile
WHEEL = "kinema-0.1.0-py3-none-any.whl"
def get_requires_for_build_editable(settings=None): return []
def build_editable(folder, settings=None, metadata=None):
    parts = {
        "METADATA": "Metadata-Version: 2.1\\nName: kinema\\nVersion: 0.1.0\\n",
        "WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        "entry_points.txt": "[console_scripts]\\nkinema = kinema.program:main\\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(f"{folder}/{WHEEL}", "w") as wheel:
        wheel.writestr("kinema.pth", os.getcwd() + "\\n")
        for name, text in parts.items():
            wheel.writestr(f"kinema-0.1.0.dist-info/{name}", text)
    return WHEEL
"""


def write_tree(folder: Path) -> None:
    """A source tree that installs without a network: it builds itself."""
    (folder / "kinema").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["kinema"]\n'
    )
    (folder / "kinema/backend.py").write_text(BACKEND)
    (folder / "kinema/__init__.py").write_text("")
    (folder / "kinema/program.py").write_text("def main():\n    print('[]')\n")
    (folder / "private.txt").write_text("stays here")


def write_torch(folder: Path) -> None:
    folder.mkdir()
    info = "torch-9.9.0.dist-info/"
    with zipfile.ZipFile(folder / "torch-9.9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 9.9.0\n")
        wheel.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(info + "RECORD", "")


@pytest.mark.slow
def test_setup_brings_code_and_environment_and_again_does_nothing(
    cluster: Cluster, homes: dict[str, Path], tmp_path: Path
) -> None:
    write_tree(tmp_path / "tree")
    write_torch(tmp_path / "wheels")
    words = ["setup", "--source", str(tmp_path / "tree"), "--wheelhouse", str(tmp_path / "wheels")]
    words += ["--into", "~/code", "--torch", "torch==9.9.0", "--python", sys.executable]
    words += ["--include", "node1"]
    told = cluster.kinema(*words, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert "node1: would get 3 files of kinema" in told.stdout
    assert "would run" in told.stdout
    assert "torch==9.9.0" in told.stdout
    assert not (homes["node1"] / "code").exists()

    wheel = tmp_path / "kinema-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    told = cluster.kinema(
        *("setup", "--kinema", str(wheel), "--into", "~/code", "--venv", "~/other", "--dry-run")
    )
    assert f"node1, node2: would get 1 file ({wheel.name}), 0 bytes" in told.stdout
    assert f"-m venv {homes['node2']}/other" in told.stdout
    assert f"{homes['node2']}/code/{wheel.name}\n" in told.stdout

    done = cluster.kinema(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 1 hosts: kinema 0.1.0 (" in done.stdout
    assert "torch 9.9.0" in done.stdout
    assert not (homes["node1"] / "code/private.txt").exists()
    # Again, only changed code is copied; what is installed is the tree itself.
    (tmp_path / "tree/kinema/program.py").write_text(
        'def main():\n    print(\'[{"name": "disk", "status": "problem", '
        '"detail": "1 GiB free", "advice": "free some"}]\')\n'
    )
    changed = cluster.kinema(*words)
    assert "node1: got 1 file of kinema" in changed.stdout
    assert changed.stdout.count("got") == 1
    assert "node1: nothing to install" in changed.stdout
    assert changed.returncode == 1
    assert "node1: disk: 1 GiB free (free some)" in changed.stderr
