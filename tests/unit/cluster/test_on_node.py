"""What is sent to nodes: keeps to their old Python, and stays in its folder."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kinema.cluster import running
from kinema.cluster.collect import Collector
from kinema.cluster.hostfile import Host
from kinema.cluster.on_node import install, stacks, tree
from kinema.cluster.on_node.processes import HOST_MARK, MARK, end, find, send
from kinema.cluster.on_node.receive import inside
from kinema.cluster.remote import FOLDER, NODE_PYTHON, Answer, call
from kinema.cluster.ssh import Ssh, explain

MODULES = sorted(FOLDER.glob("[a-z]*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_bare_node_can_run_it(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=NODE_PYTHON)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            ours = name.startswith("kinema.cluster.on_node")
            assert ours or name.split(".")[0] in {*sys.stdlib_module_names, "__main__"}, name


def test_arguments_travel_in_the_payload_not_on_the_command_line() -> None:
    command, text = call("tree", {"path": "/a; reboot", "hash_sizes": {}}, python=sys.executable)
    assert "reboot" not in " ".join(command)
    done = subprocess.run(command, input=text, capture_output=True, check=True)
    assert done.stdout == b'{"files": {}, "arriving": {}, "folder": false}'


def test_the_agent_waits_for_a_script_that_becomes_python(tmp_path: Path) -> None:
    """Told to stop before its torchrun is known as ours, it leaves nothing behind all the same."""
    name = f"launch-{tmp_path.parent.name}-wrapper"
    late = f"trap '' TERM; sleep 0.7; exec {sys.executable} -c 'import time; time.sleep(600)'"
    command, text = call(
        "agent",
        {
            "host": "n1",
            "others": ["n1"],
            "launch": name,
            "command": ["sh", "-c", late],
            "environment": {MARK: name, HOST_MARK: "n1"},
            "folder": str(tmp_path),
            "grace_s": 0,
        },
        python=sys.executable,
    )
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, input=text, capture_output=True, env=variables, timeout=120)
    left = find("n1", ["n1"], name)
    for process in left:
        os.kill(process["pid"], signal.SIGKILL)
    assert left == []
    assert b'"code": -9, "remaining": []' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_same_number_is_left_alone() -> None:
    mark = f"launch-{os.getpid()}-send"
    process = start("import time; print(flush=True); time.sleep(60)", mark)
    try:
        (found,) = find("n1", ["n1"], mark)
        send({**found, "start": "1"}, signal.SIGKILL)
        assert process.poll() is None
        send(found, signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        send(found, signal.SIGKILL)  # gone: nothing happens
    finally:
        process.kill()
        process.communicate()


def test_words_reach_the_remote_shell_as_they_are() -> None:
    words = Ssh(options=("A=b",)).command(Host("n", user="u", port=22), ["echo", "a'b; c", "$d"])
    assert words[:2] == ["ssh", "-T"]
    assert "BatchMode=yes" in words
    assert words[-8:-1] == ["A=b", "-p", "22", "-l", "u", "--", "n"]
    assert words[-1] == "echo 'a'\"'\"'b; c' '$d'"


@pytest.mark.parametrize(
    ("stderr", "what"),
    [
        ("ssh: Could not resolve hostname n: Name or service not known", "no such name"),
        ("u@n: Permission denied (publickey).", "refuses this user's key"),
        ("ssh: connect to host n port 22: Connection timed out", "does not answer"),
        ("ssh: connect to host n port 22: No route to host", "cannot be reached"),
        ("No ED25519 host key is known for n\nHost key verification failed.", "is not known here"),
        ("kex_exchange_identification: read: Connection reset by peer", "--at-once"),
        ("client_loop: send disconnect: Broken pipe", "the connection ended: client_loop"),
        ("", "the connection ended"),
    ],
)
def test_what_ssh_says_becomes_a_cure(stderr: str, what: str) -> None:
    assert what in str(explain(stderr, Host("n")))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "..", "."])
def test_no_file_arrives_elsewhere(name: str) -> None:
    with pytest.raises(ValueError, match="leads out of its folder"):
        inside("/data/hidden", name)


def test_links_in_a_folder_are_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "blobs/deep").mkdir(parents=True)
    (tmp_path / "blobs/deep/one.pt").write_bytes(b"1")
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "snapshot").symlink_to(tmp_path / "blobs")
    (folder / "two.pt").symlink_to(tmp_path / "blobs/deep/one.pt")
    (folder / "endless").symlink_to(tmp_path)
    (tmp_path / "door").symlink_to(folder)
    for path in (folder, tmp_path / "door"):
        assert tree.main(str(path))["files"].keys() == {"snapshot/deep/one.pt", "two.pt"}


def test_what_pip_objects_to_is_the_answer(tmp_path: Path) -> None:
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && { echo 3.11.7; exit; }\n'
        'echo "ERROR: No matching distribution found for torch==1.2.3"; exit 1\n'
    )
    python.chmod(0o755)
    given: dict[str, Any] = {"base": str(python), "torch": "torch==1.2.3", "kinema": None}
    given |= {"extras": "", "index_url": None, "wheelhouse": None, "dry_run": False}
    said = install.main(str(tmp_path), str(tmp_path / "venv"), **given)
    assert "No matching distribution found for torch==1.2.3" in said["error"]
    assert not (tmp_path / "venv" / install.DONE).exists()


def start(code: str, mark: str, host: str = "n1", rank: str = "") -> subprocess.Popen[bytes]:
    environment = os.environ | {MARK: mark, HOST_MARK: host} | ({"RANK": rank} if rank else {})
    process = subprocess.Popen(
        [sys.executable, "-c", code, "kinema"], env=environment, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_processes_belong_to_the_host_that_started_them() -> None:
    wait = "import time; print(flush=True); time.sleep(60)"
    processes = [start(wait, "unit-a", host="n1"), start(wait, "unit-a", host="n2")]
    try:

        def pids(host: str, others: list[str]) -> list[int]:
            return [p["pid"] for p in find(host, others, "unit-a")]

        one, two = (p.pid for p in processes)
        assert pids("n1", ["n1", "n2"]) == [one]
        assert pids("n2", ["n1", "n2"]) == [two]
        # Of a host that is not asked: whoever has it reports it.
        assert sorted(pids("n1", ["n1"])) == sorted([one, two])
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_what_does_not_listen_is_killed_and_counted() -> None:
    deaf = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    )
    meek = "import time; print(flush=True); time.sleep(60)"
    processes = [start(deaf, "unit-b"), start(meek, "unit-b")]
    try:
        result = end(lambda: find("n1", ["n1"], "unit-b"), grace_s=0.5)
        assert result["ended"] == 2
        assert [p["pid"] for p in result["killed"]] == [processes[0].pid]
        assert result["remaining"] == []
        assert [p.wait(10) for p in processes] == [-9, -15]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_lines_are_sorted_by_rank(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    collector = Collector(tmp_path)
    for line in (b"[rank0]: step 1\n", b"[rank9]: lost\n", b"torchrun says\n", b"[rank9]: bye\n"):
        collector.line("node2", line)
    collector.close()
    assert capfdbinary.readouterr().out == b"step 1\n"
    assert (tmp_path / "node2/rank9.log").read_text() == "lost\nbye\n"
    assert (tmp_path / "node2/torchrun.log").read_text() == "torchrun says\n"
    assert collector.tail("node2", 9) == ["lost", "bye"]


def test_a_full_disk_here_ends_the_logs_and_not_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "node1").write_text("a file where the folder should be")
    collector = Collector(tmp_path)
    for _ in range(2):
        collector.line("node1", b"[rank0]: goes on\n")
    out, error = capfd.readouterr()
    assert out == "goes on\ngoes on\n"
    assert error.count("this log ends here, the run goes on") == 1


def test_no_more_hosts_at_once_than_wanted() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def work(_: Host) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1

    Ssh(at_once=3).each([Host(f"n{i}") for i in range(12)], work)
    assert most <= 3
    assert Ssh(at_once=3).each([], work) == []


def spy(folder: Path, script: str) -> str:
    (folder / "py-spy").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "py-spy").chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exec sleep 30", "py-spy did not finish within 0.5 s"),
        ("echo 'Error: Permission Denied' >&2; exit 1", "Error: Permission Denied"),
        ("exit 9", "py-spy ended with 9"),
    ],
)
def test_a_stack_that_cannot_be_had_says_why(tmp_path: Path, script: str, said: str) -> None:
    process = start("import time; print(flush=True); time.sleep(60)", "unit-c", rank="3")
    try:
        found = stacks.main("n1", ["n1"], spy(tmp_path, script), 0.5, "unit-c")
        (dumped,) = found["processes"]
        assert (dumped["pid"], dumped["rank"], dumped["error"]) == (process.pid, 3, said)
    finally:
        process.kill()
        process.communicate()


def test_what_setup_would_run(tmp_path: Path) -> None:
    def told(**changes: Any) -> list[str]:
        given: dict[str, Any] = {
            **{"root": str(tmp_path / "tree"), "venv": str(tmp_path / "venv")},
            **{"base": sys.executable, "torch": "torch==2.13.0", "kinema": None, "extras": ""},
            **{"index_url": None, "wheelhouse": None, "dry_run": True},
        }
        did: list[str] = install.main(**{**given, **changes})["did"]
        return did

    make, torch, kinema = told(index_url="https://x/cu130", extras="wandb")
    assert make == f"{sys.executable} -m venv {tmp_path}/venv"
    assert torch.endswith(" --index-url https://x/cu130 torch==2.13.0")
    assert kinema.endswith(f" -e {tmp_path}/tree[wandb]")
    assert "--index-url" not in kinema  # PyTorch's index has not all that Kinema needs
    assert told(kinema="/w/kinema.whl", wheelhouse="/wheels")[2].endswith(
        " --no-index --find-links /wheels /w/kinema.whl"
    )
    assert (
        "there is no /no/python"
        in install.main(*("r", "v", "/no/python", "torch", None, "", None, None, True))["error"]
    )


def test_processes_that_remain_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = {"pid": 5, "launch": "job", "kind": "rank", "rank": 1, "state": "D", "command": ["a"]}

    def ask(_: Ssh, hosts: list[Host], module: str, **given: Any) -> list[Answer]:
        assert module == "stop"
        assert given["each"]["n1"]["launches"] == ["job"]
        assert given["grace_s"] == 7
        value = {"ended": 2, "killed": [stuck], "remaining": [stuck]}
        return [Answer(host, value) for host in hosts]

    monkeypatch.setattr(running, "ask", ask)
    hosts = [Host("n1"), Host("n2")]
    shown = [running.Process.of(hosts[0], stuck)]
    (ended,) = running.stop(Ssh(), shown, hosts, 7)
    assert (ended.host, ended.ended, ended.killed) == (hosts[0], 2, 1)
    assert "waits in the kernel" in str(ended.remaining[0])
