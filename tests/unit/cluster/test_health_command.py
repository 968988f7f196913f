"""The options of `kinema cluster health` and `top`: what each of them changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kinema.cli.main import app
from kinema.cluster import health as health_module
from kinema.cluster import rounds as rounds_module
from kinema.cluster import top as top_module
from kinema.cluster.health import Health, Wanted
from kinema.cluster.ssh import Ssh
from kinema.cluster.top import understand
from kinema.cluster.verdict import Check
from kinema.config.errors import KinemaError
from tests.unit.cluster.hardware import gpu_row
from tests.unit.cluster.test_top import said

WARNING = Check("open files", "warning", "1,024")
ERROR = Check("gpus", "error", "none answers")
FINE = Check("torch", "ok", "2.13.0")


class Seen:
    """What the command asked for."""

    wanted: Wanted
    rounds: tuple[Any, ...] = ()
    checks: tuple[Check, ...] = (FINE,)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Seen:
    found = Seen()

    class Examiner:
        def __init__(self, ssh: Ssh, hosts: Any, wanted: Wanted, done: Any = None) -> None:
            found.wanted = wanted

        def quick(self) -> Health:
            return Health({"n": list(found.checks)})

        def slow(self, quick: Health) -> Health:
            return Health({"n": []})

    class Rounds:
        def __init__(self, examiner: Any, quick: Any, slow: Any, history: Path, run: Any) -> None:
            found.rounds = (history, run)

        def go_on(self, pause_s: float, most_s: float | None) -> Health:
            found.rounds = (*found.rounds, pause_s, most_s)
            return Health({"n": [WARNING]})

    monkeypatch.setattr(health_module, "Examiner", Examiner)
    monkeypatch.setattr(rounds_module, "Rounds", Rounds)
    (tmp_path / "nodes.txt").write_text("n slots=2\n")
    monkeypatch.chdir(tmp_path)
    return found


def call(*words: str) -> tuple[int, str]:
    """Exit code and standard output.

    Raises:
        KinemaError: what the command says of its options.
    """
    done = CliRunner().invoke(app, ["cluster", *words])
    if isinstance(done.exception, KinemaError):
        raise done.exception
    return done.exit_code, done.stdout


def test_defaults(seen: Seen, tmp_path: Path) -> None:
    assert call("health")[0] == 0
    wanted = seen.wanted
    assert wanted.folder == str(tmp_path)
    assert (wanted.disks, wanted.weights) == (("outputs",), ())
    assert wanted.test is not None
    assert (wanted.test.sizes, wanted.test.timeout_s, wanted.test.environment) == (None, 180, {})
    assert wanted.test.python == wanted.python
    assert not seen.rounds


def test_what_is_looked_at(seen: Seen) -> None:
    call("health", "--quick")
    assert seen.wanted.test is None
    call("health", "--weights", "a", "--weights", "b", "--disk", "/x", "--disk", "y")
    assert seen.wanted.weights == ("a", "b")
    assert seen.wanted.disks == ("/x", "y")
    call("health", "--cwd", "/there", "--python", "/env/bin/python", "--limit", "open_files=7")
    assert (seen.wanted.folder, seen.wanted.python) == ("/there", "/env/bin/python")
    assert seen.wanted.limits.open_files == 7


def test_the_bandwidth_test(seen: Seen) -> None:
    call("health", "--sizes", "1M", "--time-limit", "9", "--env", "A=b", "--ib-hca", "mlx5_0")
    assert seen.wanted.test is not None
    assert (seen.wanted.test.sizes, seen.wanted.test.timeout_s) == ("1M", 9)
    assert seen.wanted.test.environment == {"A": "b", "NCCL_IB_HCA": "=mlx5_0"}
    call("health", "--interface", "eth1")
    assert seen.wanted.test.environment["GLOO_SOCKET_IFNAME"] == "eth1"


@pytest.mark.parametrize(
    ("checks", "words", "code"),
    [
        ((FINE, WARNING), (), 0),
        ((FINE, WARNING), ("--strict",), 1),
        ((FINE, ERROR), (), 1),
        ((FINE,), ("--strict",), 0),
    ],
)
def test_exit_codes(seen: Seen, checks: Any, words: tuple[str, ...], code: int) -> None:
    seen.checks = checks
    assert call("health", *words)[0] == code


def test_verbose_shows_what_is_right(seen: Seen) -> None:
    assert "torch: 2.13.0" not in call("health")[1]
    assert "torch: 2.13.0" in call("health", "--verbose")[1]


def test_again_and_again(seen: Seen, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    words = ("--every", "60s", "--for", "10m", "--history", "h.jsonl", "--run", str(run))
    assert call("health", *words)[0] == 0
    assert seen.rounds == (Path("h.jsonl"), run, 60, 600)
    assert call("health", "--every", "5m", "--strict")[0] == 1  # how it is at the end
    assert seen.rounds == (Path("cluster-health.jsonl"), None, 300, None)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--for", "1m"), "--for goes with --every"),
        (("--history", "h"), "--history goes with --every"),
        (("--run", "r"), "--run goes with --every"),
        (("--every", "1m", "--run", "nowhere"), "no such run folder"),
        (("--every", "soon"), "is no time"),
        (("--every", "0s"), "is no time"),
        (("--every", "1m", "--json"), "--json is one round"),
        (("--quick", "--sizes", "1M"), "--quick leaves out"),
        (("--quick", "--interface", "eth0"), "--quick leaves out"),
        (("--limit", "x=1"), "no limit 'x'"),
        (("--env", "A"), "sets nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(seen: Seen, words: tuple[str, ...], why: str) -> None:
    with pytest.raises(KinemaError, match=why):
        call("health", *words)


def test_top_needs_a_terminal_or_once(seen: Seen) -> None:
    with pytest.raises(KinemaError, match="--once"):
        call("top", "--json")
    with pytest.raises(KinemaError, match="terminal"):
        call("top")


def test_top_sorts_and_fails_if_no_node_answers(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [
        understand("hot", said(gpu_row(0, temperature__gpu=80))),
        understand("busy", said(gpu_row(0, power__draw=699))),
    ]

    class Watch:
        def __init__(self, ssh: Ssh, hosts: Any) -> None:
            pass

        def __enter__(self) -> Watch:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self) -> list[Any]:
            return nodes

    monkeypatch.setattr(top_module, "Watch", Watch)
    assert call("top", "--once", "--sort", "power")[1].splitlines()[1].startswith("busy")
    assert call("top", "--once", "--sort", "temperature")[1].splitlines()[1].startswith("hot")
    nodes[:] = [top_module.NodeUse("gone", problem="does not answer")]
    code, text = call("top", "--once")
    assert code == 1
    assert "does not answer" in text
