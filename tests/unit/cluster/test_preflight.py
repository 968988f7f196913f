"""What a node lacks is said with its cure, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kinema.cluster import preflight
from kinema.cluster import shared_disk as own_disk
from kinema.cluster.hostfile import Host
from kinema.cluster.on_node import shared_disk
from kinema.cluster.remote import Answer
from kinema.cluster.ssh import Problem, Ssh
from kinema.config.errors import KinemaError

FINE: dict[str, Any] = {
    "python": "3.11.7",
    "versions": {"kinema": "0.1.0", "torch": "2.13.0"},
    "code": "abc",
    "gpus": 8,
    "cores": 96,
    "folder": True,
    "missing": [],
    "writable": True,
    "free": 2**40,
}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"free": 2**30}, "1.0 GiB free for outputs; training needs 5"),
        ({"missing": ["vae.pt"]}, "lacks vae.pt; kinema cluster sync weights"),
        ({"writable": False}, "may not write to outputs"),
        ({"folder": False}, "there is no folder /work"),
        ({"versions": {"kinema": None, "torch": "2.13.0"}}, "kinema is not installed"),
        ({"python": "3.12.1"}, "Python is 3.12.1; most have 3.11.7"),
    ],
)
def test_the_node_and_the_cure_are_named(
    monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any], said: str
) -> None:
    hosts = [Host("node1"), Host("node2"), Host("node3")]
    values = [FINE, FINE | fault, FINE]

    def ask(*_: Any, **__: Any) -> list[Answer]:
        return [Answer(host, value) for host, value in zip(hosts, values, strict=True)]

    monkeypatch.setattr(preflight, "ask", ask)
    with pytest.raises(KinemaError) as raised:
        preflight.look(Ssh(), hosts, python="p", folder="/work", paths=["vae.pt"], disk="outputs")
    assert str(raised.value).startswith("1 of 3 hosts ")
    assert f"\n  node2: {said}" in str(raised.value)
    values[1] = FINE
    found = preflight.look(
        Ssh(), hosts, python="p", folder="/work", paths=["vae.pt"], disk="outputs"
    )
    assert found == [FINE, FINE, FINE]


def test_hosts_with_disks_of_their_own_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disks = {"node1": tmp_path / "a", "node2": tmp_path / "a", "node3": tmp_path / "b"}
    disks["node4"] = tmp_path / "b"
    for disk in disks.values():
        disk.mkdir(exist_ok=True)

    def ask(_: Ssh, hosts: list[Host], module: str, **given: Any) -> list[Answer]:
        assert module == "shared_disk"
        words = {key: given[key] for key in ("name", "others", "step")}
        return [
            Answer(h, shared_disk.main(f"{disks[h.name]}{given['path']}", host=h.name, **words))
            if h.name != "gone"
            else Answer(h, problem=Problem("does not answer"))
            for h in hosts
        ]

    monkeypatch.setattr(own_disk, "ask", ask)
    hosts = [Host(name) for name in disks]
    where = {"python": "p", "folder": "/not", "disk": "yet/there"}
    assert preflight.without_the_disk(Ssh(), hosts, **where) == ["node3", "node4"]
    owners = own_disk.first_with_it(Ssh(), [*hosts, Host("gone")], "/not")
    assert owners == {n: n for n in (*disks, "gone")} | {"node2": "node1", "node4": "node3"}
    assert list(tmp_path.rglob(".kinema*")) == []
