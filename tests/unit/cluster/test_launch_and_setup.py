"""Launch and setup where the nodes' answers are given."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kinema.cluster import setup
from kinema.cluster.collect import Collector
from kinema.cluster.hostfile import Host
from kinema.cluster.launch import Launch
from kinema.cluster.on_node.agent import MARK
from kinema.cluster.plan import Job, Meeting, Node
from kinema.cluster.remote import Answer
from kinema.cluster.ssh import Ssh
from kinema.config.errors import KinemaError

JOB = Job(("train", "tiny/smoke"), "job-1", "/", "python3", {})


@pytest.mark.parametrize("words", ["no json", "[1]", '{"remaining": 3}'])
def test_an_agent_that_talks_nonsense_ends_the_launch(
    words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(self: Ssh, host: Host, remote: Sequence[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        script = ["sh", "-c", 'printf "%s\\n" "$1"; exec sleep 60', "", MARK + words]
        return subprocess.Popen(script, stdin=pipe, stdout=pipe, stderr=pipe)

    monkeypatch.setattr(Ssh, "start", start)
    launch = Launch(
        Ssh(), JOB, [Node(Host("n1"), 1)], Meeting("n1", 1), Collector(tmp_path), say=print
    )
    with pytest.raises(KinemaError, match="what keeps torchrun on n1 ended with code -9"):
        launch.run()


def test_of_hosts_with_one_disk_the_first_installs_and_then_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    def ask(_: Ssh, hosts: Sequence[Host], module: str, **given: Any) -> list[Answer]:
        assert module == "install"
        asked.append([host.name for host in hosts])
        return [Answer(host, {}) for host in hosts]

    owners = {"a": "a", "b": "a", "c": "c"}
    monkeypatch.setattr(setup, "ask", ask)
    monkeypatch.setattr(setup, "first_with_it", lambda *_: owners)
    hosts = [Host(name) for name in owners]
    wanted = setup.Wanted("~/k", "~/k/.venv", "python3", "torch", None, "kinema==0.1.0")
    answers = setup._install(Ssh(), hosts, wanted, wanted.kinema, None, dry_run=False)
    assert asked == [["a", "c"], ["b"]]
    assert [a.host.name for a in answers] == ["a", "c", "b"]
    setup._install(Ssh(), hosts, wanted, wanted.kinema, None, dry_run=True)
    assert asked[2:] == [["a", "c"], []]
