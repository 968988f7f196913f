"""Which hosts there are: files, Slurm's variables, choices."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.cluster.hostfile import Host, find_hosts, read_hostfile
from kinema.cluster.slurm_nodes import expand_nodes
from kinema.config.errors import KinemaError


def write(folder: Path, text: str) -> Path:
    path = folder / "nodes.txt"
    path.write_text(text)
    return path


def test_a_hostfile_as_other_launchers_have_it(tmp_path: Path) -> None:
    text = (
        "# two nodes\nnode1 slots=8\n\n  trainer@10.0.0.2 slots=4 port=2222 # the old one\nnode3\n"
    )
    assert read_hostfile(write(tmp_path, text)) == [
        Host("node1", 8),
        Host("10.0.0.2", 4, "trainer", 2222),
        Host("node3"),
    ]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("node1 slot=8", "'slot=8' is not known"),
        ("node1 slots=0", "slots=0 is not possible"),
        ("node1 slots=many", "slots=many is not possible"),
        ("node1 port=70000", "port=70000 is not possible"),
        ("node1 8", "'8' is not known"),
        ("node0", "node0 is listed twice"),
        ("-oProxyCommand=reboot", "is no name of a host"),
        ("node1;reboot", "is no name of a host"),
        ("node1 user=-l", "is no name of a user"),
        ("a@node1 user=b", "user is given twice"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(tmp_path: Path, line: str, wrong: str) -> None:
    path = write(tmp_path, f"node0 slots=8\n{line}\n")
    with pytest.raises(KinemaError) as raised:
        read_hostfile(path)
    assert raised.value.where == f"{path}:2"
    assert wrong in raised.value.what


def test_no_file_or_no_host_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(KinemaError, match="no such hostfile"):
        read_hostfile(tmp_path / "none.txt")
    with pytest.raises(KinemaError, match="lists no host"):
        read_hostfile(write(tmp_path, "# nothing yet\n"))


def test_hosts_are_chosen_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "a\nb\nc\n")
    assert [h.name for h in find_hosts(path, include=["c", "a"])] == ["a", "c"]
    assert [h.name for h in find_hosts(path, exclude=["b"])] == ["a", "c"]
    with pytest.raises(KinemaError, match="has no host 'd'; it has a, b, c"):
        find_hosts(path, exclude=["d"])
    with pytest.raises(KinemaError, match="no host is left"):
        find_hosts(path, include=["a"], exclude=["a"])


def test_without_a_file_the_nodes_of_the_slurm_job_are_taken(tmp_path: Path) -> None:
    job = {"SLURM_JOB_NODELIST": "gpu[01-02]", "SLURM_GPUS_ON_NODE": "8"}
    assert find_hosts(environment=job) == [Host("gpu01", 8), Host("gpu02", 8)]
    assert find_hosts(write(tmp_path, "a\n"), environment=job) == [Host("a")]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("login1", ["login1"]),
        ("gpu[01-03,07],login1", ["gpu01", "gpu02", "gpu03", "gpu07", "login1"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("a[8-11]-ib", ["a8-ib", "a9-ib", "a10-ib", "a11-ib"]),
    ],
)
def test_slurms_lists_of_nodes(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize(
    "text", ["", "gpu[1-", "gpu[3-1]", "gpu[]", "a,,b", "gpu[1-9999999]", "a]b["]
)
def test_a_broken_list_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(KinemaError, match="SLURM_JOB_NODELIST"):
        expand_nodes(text)
