"""Python on other machines: a module of `kinema.cluster.on_node` runs there and answers JSON.

The module's text goes over the connection, so a node needs nothing but `python3`: no Kinema, no
torch. Modules of that folder may import one another and the standard library, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.cluster.hostfile import Host
from kinema.cluster.ssh import Problem, Result, Ssh

FOLDER = Path(__file__).parent / "on_node"
PACKAGE = "kinema.cluster.on_node"
NODE_PYTHON = (3, 9)
"""The oldest Python that the modules keep to."""

# Reads its payload's length from the command line, the payload from stdin, and leaves the rest of
# stdin to the module. An alarm ends what outlives its time limit, as a lost connection would not.
BOOTSTRAP = f"""
import sys
if sys.version_info < {NODE_PYTHON}: sys.exit("python3 is older than 3.9")
import importlib.abc, importlib.util, json, signal
payload = json.loads(sys.stdin.buffer.read(int(sys.argv[1])))
class Sent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in payload["sources"]:
            return importlib.util.spec_from_loader(
                name, self, is_package=not payload["sources"][name])
    def create_module(self, spec): return None
    def exec_module(self, module):
        exec(compile(payload["sources"][module.__name__], module.__name__, "exec"), module.__dict__)
sys.meta_path.insert(0, Sent())
if payload["limit"]: signal.alarm(payload["limit"])
import importlib
answer = importlib.import_module(payload["module"]).main(**payload["arguments"])
if answer is not None: json.dump(answer, sys.stdout)
""".strip()


@dataclass(frozen=True)
class Answer:
    """What a module said on a host: `value` (from JSON), or the problem."""

    host: Host
    value: Any = None
    problem: Problem | None = None


def call(
    module: str, arguments: dict[str, Any], *, python: str = "python3", limit_s: int = 0
) -> tuple[list[str], bytes]:
    """The remote command, and what goes into its stdin first, that run a module's `main`.

    Args:
        module: name of a file in `on_node`, without `.py`.
        limit_s: seconds after which it ends by itself; 0: never.
    """
    sources = {"kinema": "", "kinema.cluster": "", PACKAGE: ""}
    for file in sorted(FOLDER.glob("[a-z]*.py")):
        sources[f"{PACKAGE}.{file.stem}"] = file.read_text()
    name = f"{PACKAGE}.{module}"
    assert name in sources, module
    payload = {"sources": sources, "module": name, "arguments": arguments, "limit": limit_s}
    text = json.dumps(payload).encode()
    # The name is for whoever reads the node's list of processes.
    return [python, "-c", BOOTSTRAP, str(len(text)), name], text


def ask(
    ssh: Ssh,
    hosts: Sequence[Host],
    module: str,
    *,
    timeout_s: float = 60,
    python: str = "python3",
    each: dict[str, dict[str, Any]] | None = None,
    heard: Callable[[Answer], None] | None = None,
    **arguments: Any,
) -> list[Answer]:
    """Run a module of `on_node` on every host at once; answers in the order of the hosts.

    Args:
        python: interpreter on the nodes.
        each: more arguments for single hosts, by name.
        heard: called with each answer as it comes, in any thread.
        arguments: of the module's `main`; JSON values.
    """

    def one(host: Host) -> Answer:
        given = arguments | (each or {}).get(host.name, {})
        command, text = call(module, given, python=python, limit_s=int(timeout_s) + 5)
        result = ssh.run(host, command, stdin=text, timeout_s=timeout_s)
        answer = _answer(result, python)
        if heard is not None:
            heard(answer)
        return answer

    return ssh.each(hosts, one)


def failure(code: int, stderr: str, python: str) -> Problem:
    """Why Python on a node ended with an exit code other than 0."""
    if code in (126, 127):
        return Problem(f"there is no {python}", "install it there, or kinema cluster setup")
    last = [line for line in stderr.splitlines() if line.strip()][-1:]
    return Problem(last[0].strip() if last else f"Python ended with code {code}")


def _answer(result: Result, python: str) -> Answer:
    if result.problem or result.code:
        problem = result.problem or failure(result.code, result.stderr, python)
        return Answer(result.host, problem=problem)
    try:
        return Answer(result.host, json.loads(result.stdout or b"null"))
    except ValueError:
        start = result.stdout[:80].decode(errors="replace")
        problem = Problem(
            f"its shell prints something of its own: {start!r}",
            "nothing may print in ~/.bashrc when no terminal is there",
        )
        return Answer(result.host, problem=problem)
