"""Hosts that cannot be used are all named at once, before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kinema.cluster.hostfile import Host
from kinema.cluster.remote import ask
from kinema.cluster.ssh import Ssh
from tests.integration.cluster_fixtures import Cluster, loopback, needs_sshd

pytestmark = needs_sshd


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with loopback(tmp_path_factory.mktemp("cluster"), "node1", "node2") as running:
        yield running


def test_every_host_that_fails_is_named_with_its_cure(tmp_path: Path) -> None:
    with loopback(tmp_path, "node1", "impostor", "off", "stranger") as cluster:
        cluster.write_key("impostor", tmp_path / "host-node1")
        known = (tmp_path / "known_hosts").read_text().splitlines(keepends=True)
        known = [line for line in known if f":{cluster.ports['stranger']} " not in line]
        (tmp_path / "known_hosts").write_text("".join(known))
        cluster.stop("off")
        with cluster.hostfile.open("a") as file:
            file.write("misnamed.invalid slots=8\n")
        done = cluster.kinema("launch", "tiny/smoke")
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert lines[0] == "error: 4 of 5 hosts do not answer:"
        cures = {line.split(":")[0].strip(): line for line in lines[1:]}
        assert "another than the known one" in cures["impostor"]
        assert "ssh-keygen -R impostor" in cures["impostor"]
        assert "no ssh server answers there; start sshd" in cures["off"]
        assert "its host key is not known here; `ssh stranger` once by hand" in cures["stranger"]
        assert "no such name; correct it in the hostfile" in cures["misnamed.invalid"]
        assert "node1" not in cures


def test_a_user_whose_key_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "ssh_config"
    config.write_text(cluster.config.read_text().replace("/key\n", "/host-node1\n"))
    (answer,) = ask(Ssh(config), [Host("node2")], "processes", host="node2", others=[])
    assert str(answer.problem).startswith("refuses this user's key; ssh-copy-id node2")


def test_what_a_node_cannot_do_is_said_in_a_line(cluster: Cluster) -> None:
    hosts = cluster.hosts[:1]
    (answer,) = ask(cluster.ssh, hosts, "tree", path="/", python="/no/python")
    assert "there is no /no/python" in str(answer.problem)
    (answer,) = ask(cluster.ssh, hosts, "stop", host="node1")
    assert "missing" in str(answer.problem)  # the last line of the traceback
    (answer,) = ask(cluster.ssh, hosts, "meeting", timeout_s=30, address="::1", port=9)
    assert "error" in answer.value
    slow = cluster.ssh.run(hosts[0], ["sleep", "30"], timeout_s=1)
    assert "did not answer within 1 s" in str(slow.problem)
    assert cluster.ssh.run(hosts[0], ["sh", "-c", "exit 7"], timeout_s=30).code == 7


def test_missing_files_and_ways_are_found_before_the_start(
    cluster: Cluster, tmp_path: Path
) -> None:
    done = cluster.kinema("launch", "tiny/smoke", "--data-path", "no.parquet")
    assert done.returncode == 1
    assert "2 of 2 hosts are not ready" in done.stderr
    assert "node2: lacks no.parquet; kinema cluster sync weights" in done.stderr

    words = ("launch", "tiny/smoke", "--data-path", str(cluster.config))
    done = cluster.kinema(*words, "--address", "::1")
    assert done.returncode == 1
    assert "node2: does not reach node1 at ::1:" in done.stderr
    taken = cluster.kinema(*words, "--port", str(cluster.ports["node1"]))
    assert taken.returncode == 1
    assert "Address already in use" in taken.stderr
    more = ("--cwd", str(tmp_path), "--nproc-per-node", "3", "--max-restarts", "7")
    fine = cluster.kinema(
        *(*words, *more, "--dry-run", "--env", "NCCL_DEBUG=INFO", "--ib-hca", "mlx5_0")
    )
    assert fine.returncode == 0, fine.stderr
    for wanted in (f"cd {tmp_path} && ", "--nproc-per-node=3", "--max-restarts=7"):
        assert fine.stdout.count(wanted) == 2
    assert list(tmp_path.iterdir()) == []
    for wanted in ("NCCL_DEBUG=INFO", "NCCL_IB_HCA==mlx5_0"):
        assert fine.stdout.count(wanted) == 2
    assert fine.stdout.count(f"kinema train tiny/smoke --data-path {cluster.config}") == 2


def test_lines_and_scripts_need_no_node(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base: tiny/smoke\nenvironment: {NCCL_ALGO: Ring}\n")
    words = ("--include", "node1", str(tmp_path / "recipe.yaml"), "--data-path", "m.csv")
    lines = cluster.kinema("launch", "--print", "torchrun", *words)
    assert lines.returncode == 0, lines.stderr
    assert "--rdzv-endpoint=127.0.0.1:29500" in lines.stdout
    assert " NCCL_ALGO=Ring " in lines.stdout
    script = cluster.kinema("launch", "--print", "slurm", "--time", "2:00:00", *words)
    assert script.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=kinema\n#SBATCH --nodes=1\n")
    assert "export NCCL_ALGO=Ring" in script.stdout
    wrong = cluster.kinema("launch", "--time", "2:00:00", *words)
    assert "--time goes with --print slurm" in wrong.stderr
