"""The whole checkpoints of a run on this machine, from what their `state.json` says."""

from __future__ import annotations

import json
import os
import re
from typing import Any

NAME = re.compile(r"epoch(\d+)-global_step(\d+)")
ABOUT = ("run.json", "recipe.yaml", "log.jsonl", "events.jsonl")
"""Files of the run itself that are worth having."""


def main(run: str, leave: list[str]) -> dict[str, Any]:
    """Look into a run folder.

    Args:
        run: `~` is the home folder.
        leave: sections that are not wanted.

    Returns:
        `error`, or `checkpoints`, the newest first: `name`, `step` and `files` (name -> [size,
        SHA-256]), with `state.json` read whole as `state`; and `about` (name -> size).
    """
    run = os.path.expanduser(run)
    if not os.path.isdir(run):
        return {"error": "no such folder"}
    found = []
    for name in os.listdir(run):
        match = NAME.fullmatch(name)
        checkpoint = _read(os.path.join(run, name), leave) if match else None
        if match and checkpoint:
            found.append(
                {"name": name, "step": int(match[2]), "epoch": int(match[1]), **checkpoint}
            )
    found.sort(key=lambda c: (c["step"], c["epoch"]), reverse=True)
    about = {n: os.path.getsize(os.path.join(run, n)) for n in ABOUT if _is_file(run, n)}
    return {"checkpoints": found, "about": about}


def _read(folder: str, leave: list[str]) -> dict[str, Any] | None:
    """A checkpoint's wanted files; None where one is missing or not whole."""
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            state = file.read()
        sections = json.loads(state)["sections"]
        files = {
            name: [record["size"], record["sha256"]]
            for section, records in sections.items()
            if section not in leave
            for name, record in records.items()
        }
        for name, (size, _) in files.items():
            if os.path.getsize(os.path.join(folder, name)) != size:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {"files": files, "state": state}


def _is_file(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))
