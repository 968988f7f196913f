"""Run folders and the checkpoints in them.

    outputs/NNN-MODEL/epochE-global_stepS/
        model.safetensors  ema.safetensors  optimizer/  components.json  recipe.yaml  state.json

Large weights are several files: `model-00001-of-00005.safetensors` and so on, with an index. A
checkpoint is written into a hidden folder of its run, flushed, and renamed.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kinema.checkpoint.disk import fsync, full_disk_explained
from kinema.checkpoint.errors import CheckpointError
from kinema.checkpoint.folder import Checkpoint, Section, checkpoint_folders, is_ours
from kinema.checkpoint.optimizer import OptimizerShare
from kinema.checkpoint.parts import (
    DELETING,
    REPLACED,
    SAVING,
    Content,
    SavePlan,
    complete,
    write_part,
)
from kinema.checkpoint.shares import share_out

__all__ = [
    "Checkpoint",
    "Section",
    "begin",
    "clean_leftovers",
    "latest",
    "new_run_folder",
    "plan_save",
    "prune",
    "resolve_weights",
    "save_checkpoint",
]


def new_run_folder(outputs: str | Path, model_name: str) -> Path:
    """Make `outputs/NNN-MODEL` with the next free number; safe when several start at once.

    Args:
        model_name: slashes and other signs that do not belong into a name become `-`.
    """
    outputs = Path(outputs)
    outputs.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.+-]+", "-", model_name).strip("-.") or "model"
    number = max(_run_numbers(outputs), default=-1) + 1
    while True:
        # Making this folder reserves the number, whatever the model is called.
        reservation = outputs / f".reserved-{number:03d}"
        try:
            reservation.mkdir()
        except FileExistsError:
            number += 1
            continue
        try:
            if number not in _run_numbers(outputs):
                folder = outputs / f"{number:03d}-{name}"
                folder.mkdir()
                fsync(outputs)
                return folder
        finally:
            reservation.rmdir()
        number += 1


def save_checkpoint(
    run: str | Path,
    epoch: int,
    step: int,
    *,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any],
    components: Mapping[str, Any],
    recipe: str | None = None,
) -> Checkpoint:
    """Write `run/epochE-global_stepS` completely or not at all, from one process.

    A checkpoint of the same name is replaced once the new one is whole. Many ranks do the same
    with `begin`, `write_part` and `complete`.

    Args:
        model, ema: state dicts, written as safetensors.
        optimizer: flat dict of tensors (numbers belong into `state`).
        state, components, recipe: see `Content`.

    Raises:
        CheckpointError: the disk is full; what was there before is untouched.
    """
    weights = {"model": model} | ({} if ema is None else {"ema": ema})
    plan = plan_save(Path(run), epoch, step, weights, optimizer, ranks=1)
    share = None if optimizer is None else OptimizerShare(optimizer, 0, 1)
    begin(plan)
    try:
        write_part(plan, 0, weights, share, share.tensors if share else {})
        return complete(plan, Content(state, components, recipe))
    except BaseException:
        shutil.rmtree(plan.folder, ignore_errors=True)
        raise


def plan_save(
    run: Path,
    epoch: int,
    step: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Tensor] | None,
    *,
    ranks: int,
) -> SavePlan:
    """What is to be saved and by whom: the same on every rank.

    Args:
        weights: state dicts by section, sharded or not.
        optimizer: flat dict of tensors.
        ranks: that save together.
    """
    tensors = [t for of in (*weights.values(), optimizer or {}) for t in of.values()]
    needs = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
    files = share_out(weights, ranks)
    return SavePlan(run, epoch, step, files, ranks, needs, optimizer is not None)


def begin(plan: SavePlan) -> None:
    """Make the folder that a save is written into. For rank 0, before any rank writes.

    Raises:
        CheckpointError: the folder cannot be made.
    """
    with full_disk_explained(plan.final, needs=plan.needs):
        try:
            clean_leftovers(plan.run)
            plan.folder.mkdir(parents=True)
        except PermissionError as error:
            raise CheckpointError(
                f"could not be written: {error.strerror}", where=str(error.filename)
            ) from error


def clean_leftovers(run: str | Path) -> list[str]:
    """Remove what killed saves left in a run folder. For the one process that writes the run.

    Returns:
        One line for each thing removed or recovered.
    """
    run = Path(run)
    lines = []
    for path in sorted(run.iterdir()) if run.is_dir() else []:
        if path.name.startswith(REPLACED):
            final = run / path.name.removeprefix(REPLACED)
            if not final.exists():
                os.rename(path, final)
                lines.append(f"recovered {final.name}: its replacement was interrupted")
                continue
        if path.name.startswith((SAVING, REPLACED, DELETING)):
            shutil.rmtree(path)
            lines.append(f"removed {path.name}: left by an interrupted run")
    return lines


def latest(run: str | Path, *, sections: Sequence[Section] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None."""
    for folder in checkpoint_folders(Path(run)):
        try:
            return Checkpoint.open(folder, sections=sections)
        except CheckpointError:
            continue
    return None


def prune(run: str | Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` whole checkpoints; returns what was deleted.

    What is not whole neither counts nor is touched: it may be a copy on its way.
    """
    assert keep >= 1, "the newest checkpoint always stays"
    run = Path(run)
    whole = [folder for folder in checkpoint_folders(run) if _is_whole(folder)]
    for folder in whole[keep:]:
        hidden = run / f"{DELETING}{folder.name}"  # a kill on the way leaves no half checkpoint
        os.rename(folder, hidden)
        shutil.rmtree(hidden)
    return whole[keep:]


def resolve_weights(path: str | Path, section: Section = "model") -> Path:
    """What to hand to `load_weights`: a run folder becomes its newest whole checkpoint.

    Sizes are checked when it is a checkpoint; any other file or folder is returned as it is.

    Raises:
        CheckpointError: as `Checkpoint.open`.
    """
    path = Path(path)
    if is_ours(path):
        return Checkpoint.open(path, sections=(section,)).path
    return path


def _is_whole(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except CheckpointError:
        return False
    return True


def _run_numbers(outputs: Path) -> set[int]:
    return {int(m[1]) for p in outputs.iterdir() if (m := re.match(r"(\d{3,})-", p.name))}
