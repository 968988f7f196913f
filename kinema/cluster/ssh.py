"""Commands on other machines through the system's own `ssh`.

Whatever a person has in `~/.ssh/config` (keys, jump hosts, users, ports) applies. Nothing is ever
asked for: a password or a question about a key is an error that says what to do.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from kinema.cluster.hostfile import Host
from kinema.config.errors import KinemaError

T = TypeVar("T")
CONFIG_VARIABLE = "KINEMA_SSH_CONFIG"
SSH_FAILED = 255
"""Exit code of ssh for its own failures; others are the remote command's."""


@dataclass(frozen=True)
class Problem:
    """Why a host did not do what it was asked: one line, and what cures it."""

    what: str
    cure: str = ""

    def __str__(self) -> str:
        what = plain(self.what)
        return f"{what}; {self.cure}" if self.cure else what


@dataclass(frozen=True)
class Result:
    """What a command on a host came to. Without a problem, `code` is the command's own."""

    host: Host
    code: int
    stdout: bytes = b""
    stderr: str = ""
    problem: Problem | None = None
    """Set where the command was not run or not waited for to its end."""


@dataclass(frozen=True)
class Ssh:
    """How hosts are reached.

    Attributes:
        config: file to take in place of `~/.ssh/config`.
        connect_s: seconds that a host has to answer.
        at_once: hosts that are talked to at the same time.
        options: more of ssh's own, each as `Name=value`.
    """

    config: Path | None = None
    connect_s: int = 10
    at_once: int = 64
    options: tuple[str, ...] = field(default=())

    @classmethod
    def from_environment(cls, config: Path | None = None, at_once: int = 64) -> Ssh:
        """`config`, else the file that KINEMA_SSH_CONFIG names, else the person's own.

        Raises:
            KinemaError: there is no `ssh`, or no such file.
        """
        if shutil.which("ssh") is None:
            raise KinemaError("there is no `ssh` here", hint="install OpenSSH's client")
        named = config or (Path(text) if (text := os.environ.get(CONFIG_VARIABLE)) else None)
        if named is not None and not named.is_file():
            raise KinemaError("no such ssh configuration", where=str(named))
        return cls(named.absolute() if named else None, at_once=at_once)

    def alone(self) -> Ssh:
        """The same with connections of its own: a shared one would end with other commands."""
        return replace(self, options=(*self.options, "ControlMaster=no", "ControlPath=none"))

    def command(self, host: Host, remote: Sequence[str]) -> list[str]:
        """The local command that runs `remote` on a host, word for word as it is given."""
        options = [
            *("BatchMode=yes", f"ConnectTimeout={self.connect_s}", "LogLevel=ERROR"),
            # A machine that died is noticed after five minutes; a short break of the line is not.
            *("ServerAliveInterval=30", "ServerAliveCountMax=10"),
            *self.options,
        ]
        words = ["ssh", "-T"]
        if self.config:
            words += ["-F", str(self.config)]
        for option in options:
            words += ["-o", option]
        words += ["-p", str(host.port)] if host.port else []
        words += ["-l", host.user] if host.user else []
        return [*words, "--", host.name, shlex.join(remote)]

    def run(
        self, host: Host, remote: Sequence[str], *, stdin: bytes = b"", timeout_s: float
    ) -> Result:
        """Run a command to its end and collect what it says."""
        try:
            done = subprocess.run(
                self.command(host, remote), input=stdin, capture_output=True, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            late = Problem(f"did not answer within {timeout_s:g} s", "is it overloaded or hanging?")
            return Result(host, SSH_FAILED, problem=late)
        stderr = done.stderr.decode(errors="replace")
        problem = explain(stderr, host) if done.returncode == SSH_FAILED else None
        return Result(host, done.returncode, done.stdout, stderr, problem)

    def start(
        self, host: Host, remote: Sequence[str], *, apart: bool = True
    ) -> subprocess.Popen[bytes]:
        """Start a command with pipes to its stdin, stdout and stderr.

        Args:
            apart: Ctrl-C in the terminal does not reach it.
        """
        return subprocess.Popen(
            self.command(host, remote),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=apart,
        )

    def each(self, hosts: Iterable[Host], work: Callable[[Host], T]) -> list[T]:
        """`work` for every host, several at once; results in the order of the hosts."""
        hosts = list(hosts)
        with ThreadPoolExecutor(max(1, min(self.at_once, len(hosts)))) as pool:
            return list(pool.map(work, hosts))

    def address(self, host: Host) -> str:
        """The address or full name that ssh's configuration has for a host's name."""
        words = self.command(host, [])
        done = subprocess.run(
            [*words[:-3], "-G", "--", host.name], capture_output=True, text=True, timeout=30
        )
        found: dict[str, str] = dict(
            line.split(" ", 1) for line in done.stdout.splitlines() if " " in line
        )
        return found.get("hostname", host.name)


_EXPLAINED: tuple[tuple[str, str, str], ...] = (
    (
        "IDENTIFICATION HAS CHANGED",
        "its host key is another than the known one",
        "if the machine was set up anew: ssh-keygen -R {name}, then `ssh {name}` once by hand; "
        "if not, find out who answers there",
    ),
    (
        "Host key verification failed",
        "its host key is not known here",
        "`ssh {name}` once by hand and compare the key",
    ),
    (
        "Permission denied",
        "refuses this user's key",
        "ssh-copy-id {name}, or user= in the hostfile",
    ),
    (
        "Too many authentication failures",
        "refuses this user's keys",
        "name the right one in ~/.ssh/config: IdentityFile, IdentitiesOnly yes",
    ),
    (
        "Could not resolve hostname",
        "no such name",
        "correct it in the hostfile, or give its HostName in ~/.ssh/config",
    ),
    ("Connection refused", "no ssh server answers there", "start sshd, or port= in the hostfile"),
    ("timed out", "does not answer", "is it switched on, is a firewall between?"),
    ("No route to host", "cannot be reached", "is it switched on and in this network?"),
    ("unreachable", "cannot be reached", "is it switched on and in this network?"),
    (
        "kex_exchange_identification",
        "closed the connection before logging in",
        "too many at once? --at-once 8, or MaxStartups in its sshd_config",
    ),
    ("Bad owner or permissions", "ssh refuses its configuration", "chmod 600 ~/.ssh/config"),
    ("Bad configuration option", "ssh does not read its configuration", "correct the line"),
)


def explain(stderr: str, host: Host) -> Problem:
    """What ssh's own failure means."""
    for sign, what, cure in _EXPLAINED:
        if sign.lower() in stderr.lower():
            return Problem(what, cure.format(name=host.name))
    last = [line for line in stderr.splitlines() if line.strip()][-1:]
    return Problem(f"the connection ended: {last[0].strip()}" if last else "the connection ended")


def require(problems: Sequence[tuple[Host, Problem | None]], what: str) -> None:
    """Raise if any host has a problem, and name every one that has.

    Args:
        what: what failed, as "do not answer": `2 of 24 hosts do not answer`.
    """
    bad = [(host, problem) for host, problem in problems if problem is not None]
    if bad:
        lines = "".join(f"\n  {host.name}: {problem}" for host, problem in bad)
        raise KinemaError(f"{len(bad)} of {len(problems)} hosts {what}:{lines}")


def plain(text: str) -> str:
    """A line from a node without what a terminal would obey: other users name their programs."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def quoted(words: Sequence[Any]) -> str:
    """A command as a person can paste it into a shell."""
    return shlex.join([str(word) for word in words])
