"""The Python stack of another process, also of one that is frozen. Without torch."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

DUMP_S = 8.0
"""Limit of one attempt of py-spy."""
DENIED = ("Permission denied", "Operation not permitted", "EPERM")
COLLECTIVE = (
    "torch/distributed/",
    "kinema/parallel/gradients",
    "kinema/parallel/sharded_gradients",
)
"""Files whose functions wait for other ranks."""
INNERMOST = 6
"""Frames of a thread that say what it is doing now."""


@dataclass(frozen=True)
class Stack:
    """What was found.

    Attributes:
        text: the stack, or why there is none.
        whole: whether it is a stack.
    """

    text: str
    whole: bool

    @property
    def in_collective(self) -> bool | None:
        """Whether a thread is inside one of PyTorch's collective operations; None: unknown."""
        if not self.whole:
            return None
        return any(
            place in frame.replace("\\", "/")
            for frames in self._threads()
            for frame in frames[:INNERMOST]
            for place in COLLECTIVE
        )

    @property
    def at(self) -> str | None:
        """Where the main thread is: its innermost Python function; None: unknown."""
        threads = self._threads() if self.whole else []
        return next((frames[0] for frames in threads if frames), None)

    def _threads(self) -> list[list[str]]:
        """Frames of every thread, innermost first; the main thread comes first with py-spy."""
        threads: list[list[str]] = []
        for line in self.text.splitlines():
            if line.startswith(("Thread ", "Current thread ")):
                threads.append([])
            elif line.startswith("  ") and threads:
                threads[-1].append(line.strip())
        return threads


def process_state(pid: int) -> str:
    """`running`, `stopped`, `uninterruptible` or `dead`."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return "dead"
    return {
        psutil.STATUS_STOPPED: "stopped",
        psutil.STATUS_TRACING_STOP: "stopped",
        psutil.STATUS_DISK_SLEEP: "uninterruptible",
        psutil.STATUS_ZOMBIE: "dead",
        psutil.STATUS_DEAD: "dead",
    }.get(status, "running")


def decode_workers(pid: int) -> list[int]:
    """Processes that decode for a rank."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
    found = []
    for child in children:
        with suppress(psutil.Error):
            if "kinema.media.worker" in child.cmdline():
                found.append(child.pid)
    return found


def dump_stack(pid: int, *, fault_file: Path | None = None) -> Stack:
    """The stacks of all threads of a process, within 2 * `DUMP_S` and a second.

    By py-spy, which pauses the process shortly; a stopped one cannot be paused and is read as it
    stands. Where this user may not trace processes, by the process's own handler of SIGUSR2
    (`faulthandler`), which runs also while the process is busy outside Python.

    Args:
        fault_file: what that handler writes to; None: the process has no such handler.
    """
    tool = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    state = process_state(pid)
    if state == "dead":
        return Stack("the process is gone", False)
    problem = "py-spy is not installed"
    if tool is not None:
        # One that is stopped already cannot be stopped once more; one in the kernel never would be.
        ways = [[], ["--nonblocking"]] if state == "running" else [["--nonblocking"]]
        for options in ways:
            stack = _py_spy([tool, "dump", "--full-filenames", "--pid", str(pid), *options])
            if stack.whole:
                return stack
            problem = stack.text
    if fault_file is not None and state != "stopped":
        text = _by_signal(pid, fault_file)
        if text:
            return Stack(f"{text}\n(by signal: {_first_line(problem)})", True)
    return Stack(problem, False)


def _py_spy(command: list[str]) -> Stack:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DUMP_S, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Stack(f"py-spy gave no answer within {DUMP_S:g} s", False)
    except OSError as error:
        return Stack(f"py-spy cannot run: {error.strerror}", False)
    if done.returncode == 0 and "Thread" in done.stdout:
        return Stack(done.stdout, True)
    text = done.stderr + done.stdout
    if any(word in text for word in DENIED):
        return Stack(
            "this user may not trace processes (ptrace): allow it with "
            "`sysctl kernel.yama.ptrace_scope=0`, or the container's SYS_PTRACE capability",
            False,
        )
    return Stack(f"py-spy failed: {_first_line(text)}", False)


def _by_signal(pid: int, file: Path) -> str:
    """What the process's `faulthandler` writes when it is sent SIGUSR2; empty if nothing comes."""
    try:
        before, said = file.stat().st_size, ""
        psutil.Process(pid).send_signal(signal.SIGUSR2)
        for _ in range(10):
            time.sleep(0.1)
            with file.open(errors="replace") as opened:
                opened.seek(before)
                text = opened.read()
            if text and text == said:  # all of it: it came in pieces
                return text.strip()
            said = text
    except (OSError, psutil.Error):
        pass
    return ""


def _first_line(text: str) -> str:
    """The line that says most: the last cause that py-spy names."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if line[:2] in ("0:", "1:", "2:")]
    return (causes or lines or ["no output"])[0]
