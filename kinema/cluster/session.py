"""A connection to a host that stays open and answers one question after another."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from types import TracebackType
from typing import Any, Self

from kinema.cluster.hostfile import Host
from kinema.cluster.remote import call, failure
from kinema.cluster.ssh import SSH_FAILED, Problem, Ssh, explain


class LostError(Exception):
    """The host does not answer (any more); `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(str(problem))


class Session:
    """`on_node/MODULE.py` on a host, asked line by line::

        with Session(ssh, host, "clock") as session:
            seconds = session.ask(None, timeout_s=10)

    Not for several threads at once.

    Args:
        module: of `on_node`, with a function `answer(question)`.
        python: interpreter on the node.
    """

    def __init__(self, ssh: Ssh, host: Host, module: str, *, python: str = "python3") -> None:
        self.host = host
        self._python = python
        command, text = call("lines", {"module": module}, python=python)
        self._process = ssh.alone().start(host, command)
        self._out = text
        self._buffer = b""

    def ask(self, question: Any, *, timeout_s: float) -> Any:
        """The answer to a question; both JSON values.

        Raises:
            LostError: no answer in time, or the connection ended; the session is of no use then.
        """
        self._out += json.dumps(question).encode() + b"\n"
        line = self._line(time.monotonic() + timeout_s, timeout_s)
        try:
            return json.loads(line)
        except ValueError:
            shown = line[:80].decode(errors="replace")
            raise LostError(Problem(f"its shell prints something of its own: {shown!r}")) from None

    def _line(self, deadline: float, timeout_s: float) -> bytes:
        """Send what waits to be sent, until a whole line has come back."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            writes = [stdin] if self._out else []
            ready = select.select([stdout], writes, [], left) if left > 0 else ([], [], [])
            if not (ready[0] or ready[1]):
                late = Problem(f"did not answer within {timeout_s:g} s", "is it overloaded?")
                raise LostError(late)
            if ready[1]:
                try:
                    sent = os.write(stdin.fileno(), self._out[: select.PIPE_BUF])
                except BrokenPipeError:
                    raise LostError(self._why()) from None
                self._out = self._out[sent:]
            if ready[0]:
                text = os.read(stdout.fileno(), 1 << 16)
                if not text:
                    raise LostError(self._why())
                self._buffer += text
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _why(self) -> Problem:
        assert self._process.stderr is not None
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return Problem("the connection ended")
        stderr = self._process.stderr.read().decode(errors="replace")
        if code == SSH_FAILED:
            return explain(stderr, self.host)
        return failure(code, stderr, self._python)

    def end(self) -> None:
        """End the connection, from any thread: who waits for an answer gets a `LostError`."""
        self._process.kill()

    def close(self) -> None:
        """End the connection and free what it holds; what runs on the node ends with it."""
        self.end()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
