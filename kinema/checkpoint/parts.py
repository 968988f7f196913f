"""A checkpoint written by many ranks: each its part, then rank 0 makes it valid.

No rank talks to another here: a rank leaves a record of its part in the folder, under a hidden
name, and rank 0 waits for all records. So all of this may run beside training.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.checkpoint.disk import (
    FileRecord,
    fsync,
    full_disk_explained,
    read_record,
    write_text,
)
from kinema.checkpoint.errors import CheckpointError
from kinema.checkpoint.folder import DESCRIPTION, FORMAT, STATE_FILE, Checkpoint
from kinema.checkpoint.optimizer import CONTENTS, Chunk, OptimizerShare, write_contents
from kinema.checkpoint.safetensors_file import write_safetensors
from kinema.checkpoint.shares import WeightsFile, index_of

SAVING, REPLACED, DELETING = ".saving-", ".replaced-", ".deleting-"
"""Beginnings of the hidden folders in a run that a kill may leave behind."""
OPTIMIZER = "optimizer"
VISIBLE_WITHIN_S = 60.0
"""How long a folder that rank 0 has made may take to be seen on another machine: network file
systems keep for a while that there was nothing."""


class AbandonedError(Exception):
    """Rank 0 was told to wait no longer for the other ranks' parts."""


@dataclass(frozen=True)
class SavePlan:
    """What all ranks know of a save before it begins.

    Attributes:
        run: the run folder.
        files: of weights, of all ranks; see `share_out`.
        ranks: that save together.
        needs: bytes in all, about.
        optimizer: whether there is an optimizer section.
    """

    run: Path
    epoch: int
    step: int
    files: tuple[WeightsFile, ...]
    ranks: int
    needs: int
    optimizer: bool

    @property
    def final(self) -> Path:
        """The checkpoint's folder."""
        return self.run / f"epoch{self.epoch}-global_step{self.step}"

    @property
    def folder(self) -> Path:
        """Where it is written until it is whole."""
        return self.run / f"{SAVING}{self.final.name}"


@dataclass(frozen=True)
class Content:
    """What rank 0 writes beside tensors."""

    state: Mapping[str, Any]
    """JSON values; comes back as `Checkpoint.state`."""
    components: Mapping[str, Any]
    """JSON values; goes to `components.json`."""
    recipe: str | None = None
    """YAML text of the resolved recipe, goes to `recipe.yaml`."""


@dataclass(frozen=True)
class _Part:
    """The record that a rank leaves."""

    rank: int
    sections: dict[str, dict[str, FileRecord]] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> _Part:
        data = json.loads(text)
        sections = {
            section: {name: FileRecord(**record) for name, record in files.items()}
            for section, files in data["sections"].items()
        }
        return cls(data["rank"], sections, [Chunk(**chunk) for chunk in data["chunks"]])


def write_part(
    plan: SavePlan,
    rank: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    optimizer: OptimizerShare | None,
    values: Mapping[str, Tensor],
) -> None:
    """Write what one rank has to, flushed and hashed, and leave its record.

    Args:
        weights: whole tensors by section and name: those that this rank owns.
        optimizer: this rank's share, with its `values` put aside.

    Raises:
        CheckpointError: names the rank, the file and the reason.
    """
    _wait_until_visible(plan.folder, rank)
    part = _Part(rank)
    mine = [file for file in plan.files if file.rank == rank]

    def write(file: WeightsFile) -> FileRecord:
        path = plan.folder / file.name
        with _explained(path, plan, rank):
            record = write_safetensors(path, {n: weights[file.section][n] for n in file.sizes})
            fsync(path)
        return FileRecord(record.size, record.sha256, rank)

    # Side by side, because hashing a file takes longer than a good disk takes to write it.
    with ThreadPoolExecutor(2) as pool:
        jobs = [(file, pool.submit(write, file)) for file in mine]
        if optimizer is not None:
            folder = plan.folder / OPTIMIZER
            with _explained(folder, plan, rank):
                part.chunks.extend(optimizer.write(folder, values))
                records = {
                    f"{OPTIMIZER}/{name}": _hashed(folder / name, rank)
                    for name in dict.fromkeys(chunk.file for chunk in part.chunks)
                }
            if records:
                part.sections[OPTIMIZER] = records
        for file, job in jobs:
            part.sections.setdefault(file.section, {})[file.name] = job.result()
    with _explained(plan.folder, plan, rank):
        write_text(plan.folder / _record_name(rank), part.dump())


def complete(
    plan: SavePlan, content: Content, *, abandoned: Callable[[], bool] = lambda: False
) -> Checkpoint:
    """Make the checkpoint valid once every rank's part is there. For rank 0, in any thread.

    A checkpoint of the same name is replaced once the new one is whole.

    Args:
        abandoned: asked while waiting for the other ranks.

    Raises:
        CheckpointError: it could not be written, or a rank's file is not as that rank wrote it.
        AbandonedError: `abandoned` said so.
    """
    parts = _wait_for_parts(plan, abandoned)
    folder = plan.folder
    with _explained(plan.final, plan, 0):
        sections = _sections(plan, parts)
        description = {"components.json": json.dumps(dict(content.components), indent=1)}
        if content.recipe is not None:
            description["recipe.yaml"] = content.recipe
        sections[DESCRIPTION] = {n: write_text(folder / n, t) for n, t in description.items()}
        for rank in range(plan.ranks):
            (folder / _record_name(rank)).unlink()
        state = {
            "format": FORMAT,
            "epoch": plan.epoch,
            "step": plan.step,
            "versions": _versions(),
            "sections": {
                section: {name: vars(record) for name, record in files.items()}
                for section, files in sections.items()
            },
            "state": dict(content.state),
        }
        write_text(folder / STATE_FILE, json.dumps(state, indent=1))
        Checkpoint.open(folder)  # as this rank sees what the others wrote
        put_in_place(folder, plan.final)
    return Checkpoint.open(plan.final)


def put_in_place(folder: Path, final: Path) -> None:
    """Rename a whole checkpoint to its name; one that has the name makes room and is deleted."""
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


def _sections(plan: SavePlan, parts: Sequence[_Part]) -> dict[str, dict[str, FileRecord]]:
    """Records of all ranks' files by section, with the indices, which are written here."""
    found: dict[str, dict[str, FileRecord]] = {}
    for part in parts:
        for section, files in part.sections.items():
            found.setdefault(section, {}).update(files)
    sections: dict[str, dict[str, FileRecord]] = {}
    for section in dict.fromkeys(file.section for file in plan.files):
        weights = [file for file in plan.files if file.section == section]
        sections[section] = {file.name: found[section][file.name] for file in weights}
        if len(weights) > 1:
            name = f"{section}.safetensors.index.json"
            sections[section][name] = write_text(plan.folder / name, index_of(weights))
    if plan.optimizer:
        folder = plan.folder / OPTIMIZER
        write_contents(folder, [chunk for part in parts for chunk in part.chunks])
        found.setdefault(OPTIMIZER, {})[f"{OPTIMIZER}/{CONTENTS}"] = _hashed(folder / CONTENTS, 0)
        fsync(folder)
        sections[OPTIMIZER] = dict(sorted(found[OPTIMIZER].items()))
    return sections


def _wait_for_parts(plan: SavePlan, abandoned: Callable[[], bool]) -> list[_Part]:
    missing, parts = set(range(plan.ranks)), {}
    pause = 0.01
    while missing:
        names = set(os.listdir(plan.folder))
        for rank in sorted(r for r in missing if _record_name(r) in names):
            parts[rank] = _Part.load((plan.folder / _record_name(rank)).read_text())
            missing.remove(rank)
        if missing:
            if abandoned():
                raise AbandonedError
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
    return [parts[rank] for rank in range(plan.ranks)]


def _wait_until_visible(folder: Path, rank: int) -> None:
    limit = time.monotonic() + VISIBLE_WITHIN_S
    while True:
        # Listing asks a network file system anew; looking for the name alone may not.
        if folder.parent.is_dir() and folder.name in os.listdir(folder.parent):
            return
        if time.monotonic() > limit:
            raise CheckpointError(
                f"rank {rank} on {platform.node()} does not see the folder that rank 0 made",
                where=str(folder),
                hint="put `outputs` on a file system that all machines share",
            )
        time.sleep(0.1)


@contextmanager
def _explained(path: Path, plan: SavePlan, rank: int) -> Iterator[None]:
    """Errors of the file system as CheckpointErrors that name the rank."""
    where = plan.final / path.relative_to(plan.folder) if path != plan.final else path
    try:
        with full_disk_explained(where, needs=plan.needs):
            yield
    except CheckpointError as error:
        if plan.ranks == 1:
            raise
        raise CheckpointError(f"rank {rank}: {error.what}", where=error.where, hint=error.hint)  # noqa: B904 (it keeps its context)
    except OSError as error:
        said = "" if plan.ranks == 1 else f"rank {rank}: "
        raise CheckpointError(
            f"{said}could not be written: {error.strerror or error}; what was saved before is "
            "untouched",
            where=str(error.filename or where),
        ) from error


def _hashed(path: Path, rank: int) -> FileRecord:
    record = read_record(path)
    return FileRecord(record.size, record.sha256, rank)


def _record_name(rank: int) -> str:
    return f".part-{rank:05d}.json"


def _versions() -> dict[str, str]:
    try:
        kinema = metadata.version("kinema")
    except metadata.PackageNotFoundError:
        kinema = "not installed"
    return {"kinema": kinema, "torch": torch.__version__, "python": platform.python_version()}
