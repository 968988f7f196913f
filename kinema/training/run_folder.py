"""What a run folder holds from before the first step: recipe, identity, plan."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import kinema
from kinema.config.recipe import dump_recipe
from kinema.config.settings import fingerprint
from kinema.telemetry.run_json import read_run_json, update_run_json
from kinema.training.config import TrainRecipe


@cache
def code_version() -> str:
    """The package's version, and the commit where it runs from a checkout."""
    folder = Path(kinema.__file__).parent
    if not (folder.parent / ".git").exists():
        return kinema.__version__

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "+changes" if git("status", "--porcelain", "--", "kinema") else ""
        return f"{kinema.__version__}+{git('rev-parse', '--short=12', 'HEAD')}{changed}"
    except (OSError, subprocess.CalledProcessError):
        return kinema.__version__


def identity(recipe: TrainRecipe, manifest_fingerprint: str, world_size: int) -> dict[str, Any]:
    """What made a checkpoint, for its `state.json` and for `run.json`."""
    return {
        "recipe_sha256": fingerprint(recipe),
        "manifest_sha256": manifest_fingerprint,
        "world_size": world_size,
        "code": code_version(),
        "torch": torch.__version__,
    }


def describe(
    folder: Path, recipe: TrainRecipe, about: dict[str, Any], start: dict[str, Any]
) -> None:
    """Write `recipe.yaml` and one more entry of `starts` in `run.json`.

    Args:
        about: see `identity`.
        start: how this process began: step, what it was loaded from, changed keys.
    """
    temporary = folder / f".recipe.yaml.{os.getpid()}"
    temporary.write_text(dump_recipe(recipe), encoding="utf-8")
    temporary.replace(folder / "recipe.yaml")
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        **about,
        **start,
    }
    starts = [*read_run_json(folder).get("starts", []), entry]
    update_run_json(folder, {"name": recipe.name, "starts": starts})


def first_start(folder: Path, began: float) -> float:
    """When a run began for the first time, seconds since 1970; kept in `run.json`.

    Args:
        began: when this process began, which counts where it is the first.
    """
    known = read_run_json(folder).get("first_start")
    if known is not None:
        return datetime.fromisoformat(known).timestamp()
    when = datetime.fromtimestamp(began, UTC).isoformat(timespec="milliseconds")
    update_run_json(folder, {"first_start": when})
    return began
