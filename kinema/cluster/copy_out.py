"""A file or folder of this machine on all nodes: only what differs, whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.cluster.bytes_bar import MEGA, bytes_bar
from kinema.cluster.hostfile import Host
from kinema.cluster.on_node.tree import BLOCK, joined
from kinema.cluster.on_node.tree import main as look
from kinema.cluster.remote import ask, call, failure
from kinema.cluster.shared_disk import first_with_it
from kinema.cluster.ssh import SSH_FAILED, Problem, Ssh, explain
from kinema.cluster.verdict import listed
from kinema.config.errors import KinemaError

LOOK_S = 3600.0
"""For a node to hash what it has: a terabyte at some 300 MB/s."""


@dataclass(frozen=True)
class Copied:
    """What one host got."""

    host: Host
    files: int = 0
    bytes: int = 0
    problem: Problem | None = None
    same_as: str | None = None
    """The host whose disk it shares."""


def copy_out(
    ssh: Ssh,
    hosts: Sequence[Host],
    source: Path,
    target: str,
    *,
    owners: Mapping[str, str] | None = None,
    delete_with: str | None = None,
    dry_run: bool = False,
) -> list[Copied]:
    """Make `target` on every host equal to `source`.

    Files of equal size and SHA-256 stay; others are sent to a hidden place first. What a broken
    connection left there is not sent again. Hosts that share the disk get it once.

    Args:
        source: file or folder.
        target: path on the hosts; `~` is their user's home folder.
        owners: what `first_with_it` says of the folder that `target` is in; None: it is asked.
        delete_with: what else is in the folder there is removed if a file of this name is in it
            ("": always); otherwise it is a problem.
        dry_run: say what would be sent, send nothing.

    Raises:
        KinemaError: there is no such file, or an empty folder.
    """
    own = look(str(source))
    files: dict[str, list[Any]] = own["files"]
    if not files:
        what = "is an empty folder" if source.is_dir() else "no such file or folder"
        raise KinemaError(what, where=str(source))
    sizes = {name: size for name, (size, _) in files.items()}
    if owners is None:
        owners = first_with_it(ssh, hosts, os.path.dirname(target.rstrip("/")) or ".")
    shared, hosts = hosts, [h for h in hosts if owners[h.name] == h.name]
    answers = ask(ssh, hosts, "tree", timeout_s=LOOK_S, path=target, hash_sizes=sizes)
    there = {a.host.name: a for a in answers}
    needed = {
        a.host.name: [name for name in files if a.value["files"].get(name) != files[name]]
        for a in answers
        if a.problem is None
    }
    stale = {
        a.host.name: sorted(set(a.value["files"]) - set(files))
        for a in answers
        if a.problem is None
    }
    total = sum(sizes[name] for names in needed.values() for name in names)
    lock = threading.Lock()

    def one(host: Host) -> Copied:
        answer = there[host.name]
        if answer.problem is not None:
            return Copied(host, problem=answer.problem)
        if answer.value["files"] and answer.value["folder"] != own["folder"]:
            kinds = ("a folder", "a file") if answer.value["folder"] else ("a file", "a folder")
            what = f"{target} is {kinds[0]} there and {kinds[1]} here"
            return Copied(host, problem=Problem(what, "move it away"))
        names, old = needed[host.name], stale[host.name]
        if old and (delete_with is None or delete_with not in ("", *answer.value["files"])):
            what = f"{target} has {len(old)} files that are not in {source}: {listed(old)}"
            return Copied(host, problem=Problem(what, "another --into, or --delete removes them"))
        made = answer.value["folder"] == own["folder"]  # an empty folder may be where a file goes
        if dry_run or not (names or old or not made):
            return Copied(host, len(names), sum(sizes[name] for name in names))
        headers = [_header(source, name, files[name], answer.value["arriving"]) for name in names]
        keep = [name for name in files if name not in names]
        arguments = {"path": target, "keep": keep, "folder": own["folder"]}
        problem = _send(ssh, host, source, headers, arguments, count)
        return Copied(host, len(names), sum(h["size"] - h["offset"] for h in headers), problem)

    with bytes_bar(f"copying {source.name}", total) as bar:
        sent = 0

        def count(size: int) -> None:
            nonlocal sent
            with lock:
                before, sent = sent, sent + size
                bar.advance(sent // MEGA - before // MEGA)

        copied = {done.host.name: done for done in ssh.each(hosts, one)}
    return [
        copied[host.name]
        if host.name in copied
        else Copied(host, same_as=owners[host.name], problem=copied[owners[host.name]].problem)
        for host in shared
    ]


def _header(
    source: Path, name: str, record: Sequence[Any], arriving: dict[str, int]
) -> dict[str, Any]:
    size, sha256 = record
    begun = arriving.get(name or "file", 0)
    mode = os.stat(joined(str(source), name)).st_mode & 0o777
    return {
        "name": name,
        "offset": begun if begun <= size else 0,
        "size": size,
        "sha256": sha256,
        "mode": mode,
    }


def _send(
    ssh: Ssh,
    host: Host,
    source: Path,
    headers: Sequence[dict[str, Any]],
    arguments: dict[str, Any],
    count: Callable[[int], None],
) -> Problem | None:
    command, text = call("receive", arguments)
    process = ssh.start(host, command, apart=False)
    assert process.stdin is not None
    answers: list[bytes] = []
    reader = threading.Thread(target=lambda: answers.extend(_outputs(process)), daemon=True)
    reader.start()
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(text)
            for header in headers:
                process.stdin.write(json.dumps(header).encode() + b"\n")
                left = header["size"] - header["offset"]
                with open(joined(str(source), header["name"]), "rb") as file:
                    file.seek(header["offset"])
                    while left:
                        block = file.read(min(BLOCK, left))
                        if not block:
                            return Problem(f"{header['name'] or source} became shorter meanwhile")
                        process.stdin.write(block)
                        left -= len(block)
                        count(len(block))
            process.stdin.write(b"\n")
            process.stdin.flush()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
        reader.join()
    finally:
        process.kill()
        process.wait()
    stdout, stderr = answers[0], answers[1].decode(errors="replace")
    if process.returncode == SSH_FAILED:
        lost = explain(stderr, host)
        return Problem(lost.what, lost.cure or "the same command goes on from there")
    if process.returncode:
        return failure(process.returncode, stderr, "python3")
    error = json.loads(stdout or b"{}").get("error")
    return Problem(error) if error else None


def _outputs(process: subprocess.Popen[bytes]) -> list[bytes]:
    assert process.stdout is not None
    assert process.stderr is not None
    # Both are short, so that neither fills while the other is read.
    return [process.stdout.read(), process.stderr.read()]
