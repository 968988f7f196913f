"""Run folders and the checkpoints in them.

    outputs/NNN-MODEL/epochE-global_stepS/
        model.safetensors  ema.safetensors  optimizer/  components.json  recipe.yaml  state.json

A checkpoint is written into a hidden folder of its run, flushed, and renamed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.checkpoint.disk import FileRecord, fsync, full_disk_explained, read_record, write_text
from kinema.checkpoint.errors import CheckpointError
from kinema.checkpoint.folder import (
    DESCRIPTION,
    FORMAT,
    STATE_FILE,
    Checkpoint,
    Section,
    checkpoint_folders,
    is_ours,
)
from kinema.checkpoint.optimizer import write_optimizer
from kinema.checkpoint.weights import write_weights

__all__ = [
    "Checkpoint",
    "Section",
    "clean_leftovers",
    "latest",
    "new_run_folder",
    "prune",
    "resolve_weights",
    "save_checkpoint",
]

SAVING, REPLACED, DELETING = ".saving-", ".replaced-", ".deleting-"
"""Beginnings of the hidden folders in a run that a kill may leave behind."""


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
    """Write `run/epochE-global_stepS` completely or not at all. Call on one rank.

    A checkpoint of the same name is replaced once the new one is whole.

    Args:
        model, ema: state dicts, written as safetensors.
        optimizer: flat dict of tensors (numbers belong into `state`).
        state: JSON values; comes back as `Checkpoint.state`.
        components: JSON values; goes to `components.json`.
        recipe: YAML text of the resolved recipe, goes to `recipe.yaml`.

    Raises:
        CheckpointError: the disk is full; what was there before is untouched.
    """
    run = Path(run)
    final = run / f"epoch{epoch}-global_step{step}"
    folder = run / f"{SAVING}{final.name}"
    with full_disk_explained(final):
        clean_leftovers(run)
        try:
            folder.mkdir(parents=True)
            sections = _write_sections(folder, model, ema, optimizer, components, recipe)
            content = {
                "format": FORMAT,
                "epoch": epoch,
                "step": step,
                "versions": _versions(),
                "sections": {
                    section: {name: vars(record) for name, record in files.items()}
                    for section, files in sections.items()
                },
                "state": dict(state),
            }
            write_text(folder / STATE_FILE, json.dumps(content, indent=1))
            _put_in_place(folder, final)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return Checkpoint.open(final)


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


def _write_sections(
    folder: Path,
    model: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Tensor] | None,
    components: Mapping[str, Any],
    recipe: str | None,
) -> dict[str, dict[str, FileRecord]]:
    weights = {"model": model} | ({} if ema is None else {"ema": ema})
    sections = {}
    # Side by side, because hashing a section takes longer than a good disk takes to write it.
    with ThreadPoolExecutor(len(weights)) as pool:
        jobs = {
            section: pool.submit(write_weights, folder / f"{section}.safetensors", tensors)
            for section, tensors in weights.items()
        }
        if optimizer is not None:
            sections["optimizer"] = _write_optimizer(folder, optimizer)
        sections |= {section: job.result() for section, job in jobs.items()}
    description = {"components.json": json.dumps(dict(components), indent=1)}
    if recipe is not None:
        description["recipe.yaml"] = recipe
    sections[DESCRIPTION] = {
        name: write_text(folder / name, text) for name, text in description.items()
    }
    return sections


def _write_optimizer(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, FileRecord]:
    write_optimizer(folder / "optimizer", tensors)
    files = sorted(p for p in (folder / "optimizer").rglob("*") if p.is_file())
    for path in (*files, folder / "optimizer"):
        fsync(path)
    return {str(path.relative_to(folder)): read_record(path) for path in files}


def _put_in_place(folder: Path, final: Path) -> None:
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        os.rename(final, replaced)
    try:
        os.rename(folder, final)
    except BaseException:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        Checkpoint.open(folder)
    except CheckpointError:
        return False
    return True


def _run_numbers(outputs: Path) -> set[int]:
    return {int(m[1]) for p in outputs.iterdir() if (m := re.match(r"(\d{3,})-", p.name))}


def _versions() -> dict[str, str]:
    try:
        kinema = metadata.version("kinema")
    except metadata.PackageNotFoundError:
        kinema = "not installed"
    return {"kinema": kinema, "torch": torch.__version__, "python": platform.python_version()}
