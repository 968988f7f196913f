"""Make the environment that trains: a venv, torch, Kinema; nothing where all is as wanted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from typing import Any

OLDEST = (3, 11)
DONE = ".kinema-setup.json"
"""File in the venv that says what it was made from."""


def main(
    root: str,
    venv: str,
    base: str,
    torch: str,
    kinema: str | None,
    extras: str,
    index_url: str | None,
    wheelhouse: str | None,
    dry_run: bool,
) -> dict[str, Any]:
    """Install.

    Args:
        root: the source tree here, which is installed as it is (editable) unless `kinema` is given.
        venv: folder of the environment.
        base: interpreter that it is made with.
        torch: requirement: `torch==2.13.0`.
        kinema: a wheel here or a requirement; None: the source tree.
        extras: of Kinema, by comma.
        index_url: where pip finds torch.
        wheelhouse: folder here that pip takes everything from, without a network.
        dry_run: say what would be done.

    Returns:
        `did`: lines; `doctor`: what `kinema doctor` objects to; `node`: see `inspect_node`; or
        `error`.
    """
    root, venv = os.path.expanduser(root), os.path.expanduser(venv)
    interpreter = shutil.which(os.path.expanduser(base))
    if interpreter is None:
        return {"error": f"there is no {base}: install it, or --python"}
    version = _say_version(interpreter)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return {"error": f"{base} is Python {version}; Kinema needs 3.11: --python python3.12"}
    own = os.path.join(venv, "bin", "python")
    made = os.path.exists(own)
    if made and _say_version(own) != version:
        return {"error": f"{venv} has Python {_say_version(own)}, {base} is {version}: remove it"}
    what = os.path.expanduser(kinema) if kinema else root
    suffix = f"[{extras}]" if extras else ""
    target = [f"{what}{suffix}"] if kinema else ["-e", f"{what}{suffix}"]
    offline = ["--no-index", "--find-links", os.path.expanduser(wheelhouse)] if wheelhouse else []
    index = ["--index-url", index_url] if index_url else []
    pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *offline]
    commands = [] if made else [[interpreter, "-m", "venv", venv]]
    wanted = {"version": version, "torch": torch, "target": target, "content": _content(what)}
    done = os.path.join(venv, DONE)
    if _read(done) != wanted:
        commands += [[*pip, *index, torch], [*pip, *target]]
    did = [" ".join(command) for command in commands]
    if dry_run:
        return {"did": did, "doctor": []}
    for command in commands:
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if ran.returncode:
            lines = ran.stdout.decode(errors="replace").strip().splitlines()[-4:]
            return {"error": " ".join([*command[:4], "...:", *lines])}
    with open(f"{done}.new", "w", encoding="utf-8") as file:
        json.dump(wanted, file)
    os.replace(f"{done}.new", done)
    doctor = _doctor(os.path.join(venv, "bin", "kinema"), root)
    return {"did": did, "doctor": doctor, "node": _inspected(own)}


def _inspected(python: str) -> dict[str, Any]:
    """What `inspect_node` says under another interpreter."""
    import __main__  # holds the text of what was sent here

    source = __main__.payload["sources"]["kinema.cluster.on_node.inspect_node"]
    call = "\nimport json\nsys.stdout.write(json.dumps(main('/', [], '/')))\n"
    ran = subprocess.run(
        [python, "-I", "-"], input=(source + call).encode(), stdout=subprocess.PIPE, check=True
    )
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def _say_version(python: str) -> str:
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], stdout=subprocess.PIPE).stdout.decode().strip()


def _content(what: str) -> str:
    """Hash of what decides the dependencies: the wheel, or the tree's pyproject.toml."""
    path = os.path.join(what, "pyproject.toml") if os.path.isdir(what) else what
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _read(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _doctor(program: str, folder: str) -> list[str]:
    ran = subprocess.run([program, "doctor", "--json", "--folder", folder], capture_output=True)
    try:
        findings = json.loads(ran.stdout)
    except ValueError:
        lines = ran.stderr.decode(errors="replace").strip().splitlines()
        return [f"kinema doctor ended with code {ran.returncode}: {lines[-1] if lines else ''}"]
    return [
        f"{f['name']}: {f['detail']}" + (f" ({f['advice']})" if f["advice"] else "")
        for f in findings
        if f["status"] == "problem"
    ]
