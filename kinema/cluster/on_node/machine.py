"""This node's files and tools: what `top` and `health` read of its hardware goes through here.

KINEMA_NODE_ROOT names a folder that takes the place of `/` for what is read below /sys, /proc and
/dev. Tools are looked for on PATH first. So a test can give one host other hardware.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import Any

ROOT_VARIABLE = "KINEMA_NODE_ROOT"
MORE_FOLDERS = ("/usr/sbin", "/sbin", "/usr/bin", "/usr/local/bin", "/usr/local/cuda/bin")
"""A session without a terminal often has a short PATH."""


def path(*parts: str) -> str:
    """A file below the root: `path("sys", "class", "net")`."""
    return os.path.join(os.environ.get(ROOT_VARIABLE) or "/", *parts)


def read(*parts: str) -> str | None:
    """A file's text without the newline at its end; None where it is not or cannot be read."""
    try:
        with open(path(*parts), encoding="utf-8", errors="replace") as file:
            return file.read().rstrip("\n")
    except OSError:  # also what the kernel says of the speed of a link that is down
        return None


def names(*parts: str) -> list[str]:
    """What is in a folder, sorted; nothing where there is no such folder."""
    try:
        return sorted(os.listdir(path(*parts)))
    except OSError:
        return []


def find(tool: str) -> str | None:
    """Where a tool is."""
    return shutil.which(tool, path=os.pathsep.join([os.environ.get("PATH", ""), *MORE_FOLDERS]))


def run(tool: str, *words: str, timeout_s: float = 20) -> dict[str, Any]:
    """What a tool says: `text`, and `problem`: None, or why the text cannot be used.

    Args:
        timeout_s: a tool that asks a broken device may hang.
    """
    program = find(tool)
    if program is None:
        return {"text": "", "problem": "not installed"}
    try:
        process = subprocess.Popen(
            [program, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(os.environ, LC_ALL="C"),
        )
    except OSError as error:
        return {"text": "", "problem": f"cannot be run: {error.strerror}"}
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # Not waited for: a tool that hangs in the driver does not even end when it is killed.
        process.kill()
        return {"text": "", "problem": f"did not answer within {timeout_s:g} s"}
    text = stdout.decode("utf-8", "replace")
    problem = None
    if process.returncode:
        said = (stderr.decode("utf-8", "replace") + "\n" + text).strip().splitlines()
        problem = f"ended with code {process.returncode}: {said[0][:200] if said else ''}"
    return {"text": text, "problem": problem}


def memory() -> tuple[int, int] | None:
    """Bytes of main memory: all, used."""
    found = {}
    for line in (read("proc", "meminfo") or "").splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0].rstrip(":")] = int(words[1]) * 1024
    if "MemTotal" not in found or "MemAvailable" not in found:
        return None
    return found["MemTotal"], found["MemTotal"] - found["MemAvailable"]


def cpu_ticks() -> tuple[int, int]:
    """Of all cores since the start: working, all; zeros where it is not known."""
    words = (read("proc", "stat") or "").split("\n")[0].split()
    if words[:1] != ["cpu"]:
        return 0, 0
    ticks = [int(word) for word in words[1:9]]
    idle = sum(ticks[3:5])
    return sum(ticks) - idle, sum(ticks)


def uptime_s() -> float | None:
    words = (read("proc", "uptime") or "").split()
    return float(words[0]) if words else None


def clock() -> float:
    """Seconds since 1970, as the node's `date` has them."""
    try:
        return float(run("date", "+%s.%N", timeout_s=5)["text"])
    except ValueError:  # a `date` without nanoseconds
        return time.time()
