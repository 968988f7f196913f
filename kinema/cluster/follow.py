"""Checkpoints of a run on another machine, copied here as they appear, without the optimizer.

A checkpoint has its name here only when it is whole: until then it lies hidden, and a connection
that breaks is taken up where it broke.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.cluster.bytes_bar import MEGA, bytes_bar
from kinema.cluster.hostfile import Host
from kinema.cluster.on_node.checkpoints import ABOUT, NAME
from kinema.cluster.on_node.receive import inside
from kinema.cluster.on_node.tree import BLOCK, sha256
from kinema.cluster.remote import ask, call, failure
from kinema.cluster.ssh import SSH_FAILED, Problem, Ssh, explain
from kinema.telemetry.progress import Progress

LEAVE = ("optimizer",)
"""Sections that stay where they are: half of the bytes, of use only to resume."""
STATE = "state.json"
ARRIVING, DELETING = ".arriving-", ".deleting-"
LOOK_S = 120.0


@dataclass(frozen=True)
class Round:
    """What one look at the run came to."""

    new: tuple[Path, ...] = ()
    """Checkpoints that arrived, in the order in which they did."""
    pruned: tuple[Path, ...] = ()
    problem: Problem | None = None


def look_once(
    ssh: Ssh, host: Host, run: str, into: Path, *, keep: int | None, say: Callable[[str], None]
) -> Round:
    """Bring over what is whole there and not yet here, the newest first.

    Args:
        run: the run's folder on the host.
        into: the run's folder here.
        keep: only so many of the newest, there and here; None: all.
        say: takes a line for each checkpoint that arrives.
    """
    (answer,) = ask(ssh, [host], "checkpoints", timeout_s=LOOK_S, run=run, leave=list(LEAVE))
    if answer.problem is not None:
        return Round(problem=answer.problem)
    if "error" in answer.value:
        return Round(problem=Problem(f"{run}: {answer.value['error']}"))
    into.mkdir(parents=True, exist_ok=True)
    there = [c for c in answer.value["checkpoints"] if NAME.fullmatch(c["name"])][:keep]
    _forget(into, {c["name"] for c in there})
    new: list[Path] = []
    for checkpoint in there:
        final = into / checkpoint["name"]
        if _is_here(final, checkpoint):
            continue
        problem = _bring(ssh, host, f"{run}/{checkpoint['name']}", checkpoint, final)
        if problem is not None:
            return Round(tuple(new), problem=problem)
        say(f"{final} arrived")
        new.append(final)
    about = {name: size for name, size in answer.value["about"].items() if name in ABOUT}
    problem = _bring_about(ssh, host, run, about, into)
    return Round(tuple(new), tuple(_prune(into, keep)), problem)


def _is_here(final: Path, checkpoint: dict[str, Any]) -> bool:
    try:
        if (final / STATE).read_text() != checkpoint["state"]:
            return False  # of an earlier run, or written anew
        return all((final / n).stat().st_size == s for n, (s, _) in checkpoint["files"].items())
    except OSError:
        return False


def _bring(
    ssh: Ssh, host: Host, folder: str, checkpoint: dict[str, Any], final: Path
) -> Problem | None:
    hidden = final.with_name(f"{ARRIVING}{final.name}")
    hidden.mkdir(exist_ok=True)
    files = {name: (size, digest) for name, (size, digest) in checkpoint["files"].items()}
    problem = _receive(ssh, host, folder, hidden, {n: size for n, (size, _) in files.items()})
    if problem is not None:
        return problem
    for name, (_, digest) in files.items():
        if sha256(str(hidden / name)) != digest:
            (hidden / name).unlink()
            return Problem(f"{final.name}/{name} arrived with other content", "it is sent again")
    # Last, because it is what makes the folder a checkpoint.
    (hidden / STATE).write_text(checkpoint["state"])
    for path in (*(hidden / name for name in (*files, STATE)), hidden):
        _flush(path)
    if final.exists():
        _delete(final)
    hidden.rename(final)
    _flush(final.parent)
    return None


def _receive(
    ssh: Ssh, host: Host, folder: str, into: Path, sizes: dict[str, int]
) -> Problem | None:
    """Files of a folder there, after what has arrived of them."""
    wanted: list[tuple[str, int, int]] = []
    for name, size in sizes.items():
        try:
            place = Path(inside(str(into.absolute()), name))
        except ValueError as error:
            return Problem(str(error))
        place.parent.mkdir(parents=True, exist_ok=True)
        begun = place.stat().st_size if place.exists() else 0
        if begun > size:
            place.unlink()
            begun = 0
        wanted.append((name, begun, size))
    command, text = call("send", {"folder": folder, "files": wanted})
    process = ssh.start(host, command, apart=False)
    assert process.stdin is not None
    assert process.stdout is not None
    errors: list[bytes] = []
    reader = threading.Thread(target=lambda: errors.extend(_stderr(process)), daemon=True)
    reader.start()
    total = sum(size - begun for _, begun, size in wanted)
    try:
        try:
            process.stdin.write(text)
            process.stdin.close()
        except BrokenPipeError:
            pass  # why is on its stderr
        with bytes_bar(f"{host.name}:{folder}", total) as bar:
            whole = _write(process.stdout, into, wanted, bar)
        process.wait()
        reader.join()
    finally:
        process.kill()
        process.wait()
    said = b"".join(errors).decode(errors="replace")
    if process.returncode == SSH_FAILED:
        return explain(said, host)
    if process.returncode:
        return failure(process.returncode, said, "python3")
    return None if whole else Problem("the connection broke")


def _write(stdout: Any, into: Path, wanted: Sequence[Sequence[Any]], bar: Progress) -> bool:
    """Put the stream's bytes into their files; False where it ends too early."""
    done = 0
    for name, begun, size in wanted:
        left = size - begun
        with (into / name).open("ab") as file:
            while left:
                block = stdout.read1(min(BLOCK, left))
                if not block:
                    return False
                file.write(block)
                left -= len(block)
                before, done = done, done + len(block)
                bar.advance(done // MEGA - before // MEGA)
    return True


def _bring_about(
    ssh: Ssh, host: Host, run: str, about: dict[str, int], into: Path
) -> Problem | None:
    """The run's own small files, so that what is here is a run as well."""
    hidden = into / f"{ARRIVING}run"
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir()
    problem = _receive(ssh, host, run, hidden, about) if about else None
    if problem is None:
        for name in about:
            os.replace(hidden / name, into / name)
    shutil.rmtree(hidden)
    return problem


def _forget(into: Path, wanted: set[str]) -> None:
    """Remove parts of checkpoints that are no longer wanted, and what a kill left of pruning."""
    for path in into.iterdir():
        name = path.name.removeprefix(ARRIVING)
        gone = name != path.name and NAME.fullmatch(name) and name not in wanted
        if gone or path.name.startswith(DELETING):
            shutil.rmtree(path)


def _prune(into: Path, keep: int | None) -> list[Path]:
    found = [(m, p) for p in into.iterdir() if (m := NAME.fullmatch(p.name)) and p.is_dir()]
    found.sort(key=lambda f: (int(f[0][2]), int(f[0][1])), reverse=True)
    old = [path for _, path in found[keep:]] if keep is not None else []
    for path in old:
        _delete(path)
    return old


def _delete(path: Path) -> None:
    hidden = path.with_name(f"{DELETING}{path.name}")  # a kill on the way leaves no half checkpoint
    path.rename(hidden)
    shutil.rmtree(hidden)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stderr(process: subprocess.Popen[bytes]) -> list[bytes]:
    assert process.stderr is not None
    return [process.stderr.read()]
