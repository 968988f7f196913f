"""Run a job on all hosts at once and end all of it together."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from kinema.cluster.collect import Collector
from kinema.cluster.environment import STOP_S
from kinema.cluster.failure import Failure, culprit, reported
from kinema.cluster.on_node.agent import LOG_FOLDER, MARK
from kinema.cluster.plan import Job, Meeting, Node, environment, torchrun
from kinema.cluster.remote import call
from kinema.cluster.ssh import SSH_FAILED, Ssh, explain
from kinema.config.errors import KinemaError

FAILED_GRACE_S = 20.0
"""For the ranks of other nodes when one node has failed: most of them wait for it in vain."""
KILLED_GRACE_S = 30.0
"""For a host to confirm that all was killed."""


@dataclass
class _Line:
    """The connection to one host's agent."""

    node: Node
    process: subprocess.Popen[bytes]
    report: dict[str, Any] | None = None
    """What the agent said at its end."""
    stderr: list[bytes] = field(default_factory=list)
    ended: bool = False
    sent: threading.Event = field(default_factory=threading.Event)
    """The agent's text is on its way; orders come after it."""

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.sent.wait()
        with suppress(OSError):
            self.process.stdin.write(f"{word}\n".encode())
            self.process.stdin.flush()


class Launch:
    """One job on its nodes, from start to end.

    Args:
        say: takes lines for the person.
    """

    def __init__(
        self,
        ssh: Ssh,
        job: Job,
        nodes: Sequence[Node],
        meeting: Meeting,
        logs: Collector,
        *,
        say: Callable[[str], None],
    ) -> None:
        self._ssh = ssh.alone()
        self._job, self._nodes, self._meeting, self._logs = job, nodes, meeting, logs
        self._say = say
        self._lines: list[_Line] = []
        self._ended: queue.Queue[_Line] = queue.Queue()
        self._connecting = threading.Semaphore(ssh.at_once)
        self._asked = 0  # how often a person asked to stop
        self._kill_at: float | None = None
        self._give_up_at: float | None = None

    def run(self) -> bool:
        """Start all, wait for all. Ctrl-C stops them, a second one kills them.

        Returns:
            Whether it came to its end; False: it was stopped by a person.

        Raises:
            KinemaError: a rank failed (with its host and last lines), or a connection broke.
        """
        failed: list[_Line] = []
        with self._on_signals():
            try:
                for index in range(len(self._nodes)):
                    if not self._asked:
                        self._lines.append(self._start(index))
                if self._asked:
                    self._tell("stop")  # those that were not there yet when it was asked
                while any(not line.ended for line in self._lines):
                    with suppress(queue.Empty):
                        line = self._ended.get(timeout=0.2)
                        line.ended = True
                        if not self._fine(line):
                            failed.append(line)
                            self._one_failed(line, first=len(failed) == 1)
                    self._watch_the_clock()
            finally:
                for line in self._lines:
                    if not line.ended:
                        line.process.kill()
                self._logs.close()
        self._complain_of_remains()
        if failed and not self._asked:
            raise self._explained(failed)
        return not self._asked

    def _start(self, index: int) -> _Line:
        node, job = self._nodes[index], self._job
        arguments = {
            "host": node.host.name,
            "others": [n.host.name for n in self._nodes],
            "launch": job.name,
            "command": torchrun(job, self._nodes, index, self._meeting, logs=LOG_FOLDER),
            "environment": environment(job, node),
            "folder": job.folder,
            "grace_s": STOP_S,
        }
        command, text = call("agent", arguments, python=job.python)
        # Released by the agent's first line; one that never comes has cost its time by then.
        self._connecting.acquire(timeout=self._ssh.connect_s)
        line = _Line(node, self._ssh.start(node.host, command))
        threading.Thread(target=self._read, args=(line, text), daemon=True).start()
        return line

    def _read(self, line: _Line, text: bytes) -> None:
        process = line.process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        errors = threading.Thread(target=lambda: line.stderr.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
        errors.start()
        with suppress(OSError):
            process.stdin.write(text)
            process.stdin.flush()
        line.sent.set()
        try:
            for said in process.stdout:
                self._take(line, said)
        except (ValueError, TypeError):  # no agent says that: what it was is not known
            process.kill()
        process.wait()
        errors.join(2.0)
        self._ended.put(line)

    def _take(self, line: _Line, said: bytes) -> None:
        mark = MARK.encode()
        if said.startswith(mark):
            report = json.loads(said[len(mark) :])
            line.report = _checked(report) if report else None
            self._connecting.release()
        elif said.strip():
            self._logs.line(line.node.host.name, said)

    def _fine(self, line: _Line) -> bool:
        return line.report is not None and line.report["code"] == 0

    def _one_failed(self, line: _Line, *, first: bool) -> None:
        others = [other for other in self._lines if not other.ended]
        if not first or self._asked or not others:
            return
        names = ", ".join(other.node.host.name for other in others)
        self._say(f"{line.node.host.name} failed: stopping {names}")
        self._tell("stop")
        self._kill_at = time.monotonic() + FAILED_GRACE_S

    @contextmanager
    def _on_signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and a closed terminal stop everything, whatever else goes on."""

        def asked(number: int, _: FrameType | None) -> None:
            self._asked += 1
            # Not here: a handler may not wait, and what it interrupted may hold a lock.
            threading.Thread(target=self._stop, args=(number,), daemon=True).start()

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, asked) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        with suppress(OSError):  # the terminal may be gone
            if self._asked == 1:
                self._say(
                    f"{name}: all ranks finish their step and save (at most {STOP_S} s); "
                    "again to kill them at once"
                )
            else:
                self._say(f"{name}: killing all ranks")
        if self._asked == 1:
            self._tell("stop")
        else:
            self._kill_at = time.monotonic()

    def _tell(self, word: str) -> None:
        # Beside one another: a host that does not answer must not keep the others waiting.
        for line in list(self._lines):
            if not line.ended:
                threading.Thread(target=line.tell, args=(word,), daemon=True).start()

    def _watch_the_clock(self) -> None:
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            self._tell("kill")
            self._kill_at, self._give_up_at = None, now + KILLED_GRACE_S
        if self._give_up_at is not None and now >= self._give_up_at:
            for line in self._lines:
                line.process.kill()

    def _complain_of_remains(self) -> None:
        for line in self._lines:
            name = line.node.host.name
            if line.report is None:
                if self._asked:
                    self._say(f"{name}: did not confirm; see `kinema cluster kill`")
                continue
            for process in line.report["remaining"]:
                why = "waits in the kernel" if process["state"] == "D" else "does not end"
                self._say(f"{name}: process {process['pid']} {why} (state {process['state']})")

    def _explained(self, failed: Sequence[_Line]) -> KinemaError:
        failures: list[tuple[Failure, list[str]]] = []
        for line in failed:
            name = line.node.host.name
            failure = reported(name, self._logs.tail(name, None, 400))
            if failure is not None:
                failures.append((failure, self._logs.tail(name, failure.rank)))
        first = culprit(failures)
        if first is not None:
            lines = "".join(f"\n    {text}" for text in self._logs.tail(first.host, first.rank))
            path = self._logs.path(first.host, first.rank)
            return KinemaError(
                f"training failed on {first}; its last lines:{lines}", hint=f"the rest is in {path}"
            )
        line = failed[0]
        name, code = line.node.host.name, line.process.returncode
        if line.report is None:
            stderr = b"".join(line.stderr).decode(errors="replace")
            if code == SSH_FAILED:
                what = f"the connection to {name} is lost: {explain(stderr, line.node.host)}"
            else:
                said = stderr.strip().splitlines()[-1:] or ["it said nothing"]
                what = f"what keeps torchrun on {name} ended with code {code}: {said[0]}"
            return KinemaError(what, hint="kinema cluster kill, in case something still runs there")
        tail = "".join(f"\n    {text}" for text in self._logs.tail(name, None))
        return KinemaError(
            f"torchrun on {name} ended with code {line.report['code']}:{tail}",
            hint=f"the rest is in {self._logs.path(name, None)}",
        )


def _checked(report: Any) -> dict[str, Any]:
    """An agent's last words.

    Raises:
        TypeError: they are not what an agent says.
    """
    if not isinstance(report, dict) or not isinstance(report.get("remaining"), list):
        raise TypeError(report)
    return {"code": report.get("code"), "remaining": report["remaining"]}


def to_stderr(text: str) -> None:
    """A line beside rank 0's output."""
    sys.stderr.write(f"cluster: {text}\n")
    sys.stderr.flush()
