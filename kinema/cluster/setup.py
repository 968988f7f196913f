"""The same code and the same environment on all nodes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from kinema.cluster.copy_out import copy_out
from kinema.cluster.hostfile import Host
from kinema.cluster.preflight import differences
from kinema.cluster.remote import Answer, ask
from kinema.cluster.shared_disk import first_with_it
from kinema.cluster.ssh import Problem, Ssh, require
from kinema.config.errors import KinemaError
from kinema.telemetry.progress import Progress

TREE = ("kinema", "pyproject.toml", "README.md", "LICENSE")
"""What of a source tree an installation needs."""
INSTALL_S = 3600.0
"""For pip: gigabytes of CUDA libraries."""
WHEELS = ".wheelhouse"


@dataclass(frozen=True)
class Wanted:
    """What the nodes shall have.

    Attributes:
        into: folder on the nodes for the code; `~` is their user's home folder.
        venv: folder of the environment there.
        python: interpreter there that it is made with.
        torch: requirement of torch.
        source: source tree here to install; None: `kinema` says what.
        kinema: wheel here, or a requirement.
        extras: of Kinema, by comma.
        index_url: where pip finds torch.
        wheelhouse: folder here with all wheels, for nodes without a network.
    """

    into: str
    venv: str
    python: str
    torch: str
    source: Path | None
    kinema: str | None
    extras: str = ""
    index_url: str | None = None
    wheelhouse: Path | None = None


def source_tree() -> Path | None:
    """The source tree that this Kinema runs from, or None where it was installed otherwise."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


def installed_torch() -> str:
    """A requirement for the torch that is here, without its build (`+cu130`)."""
    try:
        return f"torch=={metadata.version('torch').split('+')[0]}"
    except metadata.PackageNotFoundError:
        return "torch"


def set_up(
    ssh: Ssh, hosts: Sequence[Host], wanted: Wanted, *, dry_run: bool, say: Callable[[str], None]
) -> None:
    """Copy, install, compare. Doing it again does only what is missing.

    Args:
        dry_run: say what would be done.
        say: takes lines for the person.

    Raises:
        KinemaError: hosts on which something failed, or that differ from the others.
    """
    kinema = wanted.kinema
    owners = first_with_it(ssh, hosts, wanted.into)
    if wanted.source is not None:
        for name in TREE:
            if (wanted.source / name).exists():
                _copy(
                    ssh, hosts, owners, wanted.source / name, f"{wanted.into}/{name}", dry_run, say
                )
    elif kinema is not None and kinema.endswith(".whl"):
        target = f"{wanted.into}/{Path(kinema).name}"
        _copy(ssh, hosts, owners, Path(kinema), target, dry_run, say)
        kinema = target
    wheels = f"{wanted.into}/{WHEELS}" if wanted.wheelhouse else None
    if wanted.wheelhouse and wheels:
        _copy(ssh, hosts, owners, wanted.wheelhouse, wheels, dry_run, say)
    answers = _install(ssh, hosts, wanted, kinema, wheels, dry_run)
    require([(a.host, a.problem or _error(a)) for a in answers], "are not set up")
    ran = "would run" if dry_run else "ran"
    did = [
        (answer.host, f"{ran} {line}" if line else "nothing to install")
        for answer in answers
        for line in answer.value["did"] or [""]
    ]
    _say_together(did, say)
    if dry_run:
        return
    _compare(answers, wanted, say)
    require([(a.host, _objection(a)) for a in answers], "are installed but not ready")


def _copy(
    ssh: Ssh,
    hosts: Sequence[Host],
    owners: Mapping[str, str],
    source: Path,
    target: str,
    dry_run: bool,
    say: Callable[[str], None],
) -> None:
    # `--into ~` must not take a folder `~/kinema` of something else for the package's.
    mark = "__init__.py" if source.name == "kinema" else ""
    copied = copy_out(ssh, hosts, source, target, owners=owners, delete_with=mark, dry_run=dry_run)
    require([(c.host, c.problem) for c in copied], f"did not get {source.name}")
    verb = "would get" if dry_run else "got"
    what = f"of {source.name}" if source.is_dir() else f"({source.name})"
    got = [
        (one.host, f"{verb} {_files(one.files)} {what}, {one.bytes:,} bytes")
        for one in copied
        if one.files
    ]
    got += [(one.host, f"shares the disk of {one.same_as}") for one in copied if one.same_as]
    _say_together(got, say)


def _install(
    ssh: Ssh,
    hosts: Sequence[Host],
    wanted: Wanted,
    kinema: str | None,
    wheels: str | None,
    dry_run: bool,
) -> list[Answer]:
    """On one host of each disk first; the others then find all in place."""
    lock = threading.Lock()
    owners = first_with_it(ssh, hosts, wanted.venv)
    first = [host for host in hosts if owners[host.name] == host.name]
    others = [] if dry_run else [host for host in hosts if host not in first]
    with Progress("installing", total=len(first) + len(others), unit="host") as bar:

        def heard(answer: Answer) -> None:
            with lock:
                bar.advance(note=answer.host.name)

        def install(some: Sequence[Host]) -> list[Answer]:
            return ask(
                ssh,
                some,
                "install",
                timeout_s=INSTALL_S,
                heard=heard,
                root=wanted.into,
                venv=wanted.venv,
                base=wanted.python,
                torch=wanted.torch,
                kinema=kinema,
                extras=wanted.extras,
                index_url=wanted.index_url,
                wheelhouse=wheels,
                dry_run=dry_run,
            )

        return [*install(first), *install(others)]


def _compare(answers: Sequence[Answer], wanted: Wanted, say: Callable[[str], None]) -> None:
    found = {a.host.name: a.value["node"] for a in answers}
    differ = differences(found)
    require([(a.host, differ.get(a.host.name)) for a in answers], "differ from the others")
    facts = next(iter(found.values()))
    versions = facts["versions"]
    if None in versions.values():
        raise KinemaError(f"not all was installed: {versions}", where=wanted.venv)
    say(
        f"all {len(answers)} hosts: kinema {versions['kinema']} ({facts['code']}), "
        f"torch {versions['torch']}, Python {facts['python']}"
    )


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def _say_together(lines: Sequence[tuple[Host, str]], say: Callable[[str], None]) -> None:
    """What is the same for several hosts in one line."""
    together: dict[str, list[str]] = {}
    for host, text in lines:
        together.setdefault(text, []).append(host.name)
    for text, names in together.items():
        say(f"{', '.join(names)}: {text}")


def _error(answer: Answer) -> Problem | None:
    return Problem(answer.value["error"]) if "error" in answer.value else None


def _objection(answer: Answer) -> Problem | None:
    found = answer.value["doctor"]
    return Problem("; ".join(found)) if found else None
