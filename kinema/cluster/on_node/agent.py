"""Keeps one node's torchrun: starts it, passes its lines on, ends all of it when told.

It is told through stdin: `stop` (SIGTERM, SIGKILL after the grace time), `kill` (at once); the end
of stdin, which is also what a broken connection is, means `stop`. Its own lines of output begin
with MARK: an empty object when it is there, and at its end torchrun's exit code with the processes
that even SIGKILL did not end.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from kinema.cluster.on_node.processes import Process, end, find

MARK = "\x1ekinema-agent "
"""Begins the agent's own lines."""
LEFTOVERS_S = 10.0
"""For what torchrun leaves behind when it ends by itself."""
WRAPPER_S = 20.0
"""For a script to become the Python that it wraps."""
LOG_FOLDER = "{logs}"
"""Stands in the command for the folder that ranks log to."""
_PR_SET_PDEATHSIG = 1


def main(
    host: str,
    others: list[str],
    launch: str,
    command: list[str],
    environment: dict[str, str],
    folder: str,
    grace_s: float,
) -> None:
    """Run torchrun to its end; exits with its code.

    Args:
        host, others, launch: as `processes.find`; `environment` marks the processes accordingly.
        command: torchrun's words, `{logs}` among them.
        folder: where it runs.
    """
    _say({})
    logs = tempfile.mkdtemp(prefix=f"kinema-{launch}-") if LOG_FOLDER in command else ""
    words = [logs if word == LOG_FOLDER else word for word in command]
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it is told through stdin
    torchrun = subprocess.Popen(
        words,
        env={**os.environ, **environment},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=_in_own_group,
    )
    relay = threading.Thread(target=_relay, args=(torchrun,), daemon=True)
    relay.start()
    stop, kill = threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(stop, kill), daemon=True).start()
    ended, by_itself = threading.Event(), threading.Event()
    waiting = (torchrun, ended, by_itself, stop)
    threading.Thread(target=_wait, args=waiting, daemon=True).start()

    def look() -> list[Process]:
        return find(host, others, launch)

    stop.wait()
    # A script in Python's place is not known as ours before it has become Python.
    patience = time.monotonic() + WRAPPER_S
    while torchrun.poll() is None and not look() and time.monotonic() < patience:
        time.sleep(0.05)
    result = end(look, LEFTOVERS_S if by_itself.is_set() else grace_s, kill.is_set)
    ended.wait(2.0)
    relay.join(2.0)
    code = torchrun.poll()
    if _say({"code": code, "remaining": result["remaining"]}) and logs:
        # All of it has been passed on; a broken connection leaves it here.
        shutil.rmtree(logs, ignore_errors=True)
    os._exit(0 if code == 0 else 1)


def _in_own_group() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    # If this agent is killed, torchrun is told to end.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _relay(torchrun: subprocess.Popen[bytes]) -> None:
    assert torchrun.stdout is not None
    out = sys.stdout.buffer
    try:
        for line in torchrun.stdout:
            out.write(line)
            out.flush()
    except OSError:
        for _ in torchrun.stdout:  # nobody listens any more; torchrun must not wait for that
            pass


def _listen(stop: threading.Event, kill: threading.Event) -> None:
    for line in sys.stdin.buffer:
        if line.strip() == b"kill":
            kill.set()
        stop.set()
    stop.set()


def _wait(
    torchrun: subprocess.Popen[bytes],
    ended: threading.Event,
    by_itself: threading.Event,
    stop: threading.Event,
) -> None:
    torchrun.wait()
    if not stop.is_set():
        by_itself.set()
    ended.set()
    stop.set()


def _say(report: dict[str, Any]) -> bool:
    """Whether somebody listened."""
    try:
        sys.stdout.write(f"\n{MARK}{json.dumps(report)}\n")
        sys.stdout.flush()
    except OSError:
        return False
    return True
