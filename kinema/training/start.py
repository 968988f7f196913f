"""What a run begins with: nothing, weights alone, or the run that goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.checkpoint.folder import Checkpoint, checkpoint_folders
from kinema.checkpoint.run import clean_leftovers
from kinema.config.errors import ConfigError, KinemaError
from kinema.config.recipe import load_recipe
from kinema.parallel.world import World
from kinema.training.config import TrainRecipe
from kinema.training.reopen import open_verified
from kinema.training.restart import Launch, newest_run
from kinema.training.resume import check_changes


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        ckpt_path: weights only (a checkpoint, a run folder or a weights file); new run folder.
        load: everything (a run folder or a checkpoint); the run goes on in its folder.
        from_scratch: with `load`: everything but the data position; new run folder.
        go_on: with the newest run of this recipe, if there is one; else as the rest says.
        allow_new: with `ckpt_path`: names (regular expressions) that the weights may lack.
        allow_unexpected: with `ckpt_path`: names that the model may lack.
    """

    ckpt_path: Path | None = None
    load: Path | None = None
    from_scratch: bool = False
    go_on: bool = False
    allow_new: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.ckpt_path and self.load:
            raise ConfigError(
                "--ckpt-path (weights only) and --load (everything) exclude each other"
            )
        if self.from_scratch and not self.load:
            raise ConfigError("--start-from-scratch goes with --load", hint="--load RUN")
        if self.go_on and self.load:
            raise ConfigError(
                "--continue finds the run to go on with by itself", hint="leave out --load"
            )
        if (self.allow_new or self.allow_unexpected) and not self.ckpt_path:
            raise ConfigError("--allow-new and --allow-unexpected go with --ckpt-path")


@dataclass(frozen=True)
class Previous:
    """The run that goes on."""

    run: Path
    checkpoint: Checkpoint | None
    """None where it was killed before its first save."""
    changed: dict[str, tuple[Any, Any]]
    """Keys of the recipe with their old and new values."""
    notes: list[str]
    """Lines for the log."""


def read_recipe(name: str | None, overrides: list[str], start: Start) -> TrainRecipe:
    """The recipe of a run: by name or file, or, with `--load`, by default the run's own.

    Raises:
        ConfigError: no recipe, or a wrong one.
    """
    if name is None:
        if start.load is None:
            raise ConfigError("needs a recipe", hint="kinema train tiny/world --data-path M")
        name = str(_run_of(start.load) / "recipe.yaml")
    return load_recipe(name, TrainRecipe, overrides)


def going_on(
    recipe: TrainRecipe, start: Start, launch: Launch, world: World
) -> tuple[Start, Path | None, list[str]]:
    """What to begin with where this launch, or with `--continue` an earlier one, has begun a run.

    Returns:
        The start; the run folder of a run that had no checkpoint yet, which begins anew as it did
        then; lines for the log.
    """

    def is_this_recipe(run: Path) -> bool:
        return load_recipe(str(run / "recipe.yaml"), TrainRecipe).name == recipe.name

    run, why = launch.run(world), "torchrun started this run again"
    if run is None and start.go_on:
        newest = newest_run(recipe.outputs, is_this_recipe) if world.is_main else None
        run, why = world.broadcast(newest), "--continue"
    if run is None:
        return start, None, []
    if world.broadcast(bool(checkpoint_folders(run))):
        return Start(load=run), None, [f"{why}: going on with {run}"]
    return start, run, [f"{why}: {run} has no checkpoint yet, and begins anew"]


def previous_run(recipe: TrainRecipe, start: Start, world: World) -> Previous | None:
    """The run that `--load` names, checked against the recipe."""
    if start.load is None:
        return None
    run = _run_of(start.load)
    old = load_recipe(str(run / "recipe.yaml"), TrainRecipe)
    changed = check_changes(old, recipe, new_position=start.from_scratch, where=str(run))
    notes = [f"changed: {key} {was!r} -> {now!r}" for key, (was, now) in changed.items()]
    if world.is_main and not start.from_scratch:
        notes += clean_leftovers(run)
    world.barrier()
    if start.load == run and not checkpoint_folders(run):
        # Killed before its first save: a restart by a script must not need another command.
        notes.append(f"no checkpoint in {run} yet: beginning at step 0")
        return Previous(run, None, changed, notes)
    checkpoint = open_verified(start.load, world)
    notes += checkpoint.warnings
    world.barrier()  # all have found it before newer ones are moved
    if world.is_main and not start.from_scratch:
        notes += _set_newer_aside(run, checkpoint)
    return Previous(run, checkpoint, changed, notes)


def _set_newer_aside(run: Path, checkpoint: Checkpoint) -> list[str]:
    """Move checkpoints of later steps out of the way of a run that goes back."""
    lines = []
    for folder in checkpoint_folders(run):
        if folder == checkpoint.path or _step_of(folder) <= checkpoint.step:
            continue
        aside = run / "set-aside" / folder.name
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        lines.append(f"moved {folder.name} to set-aside/: the run goes on from an earlier step")
    return lines


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("global_step")[2])


def _run_of(path: Path) -> Path:
    """The run folder of a path given to `--load`.

    Raises:
        KinemaError: neither a run folder nor a checkpoint in one.
    """
    for folder in (path, path.parent):
        if (folder / "recipe.yaml").is_file() and (folder / "run.json").is_file():
            return folder
    raise KinemaError(
        "is not a run folder, nor a checkpoint in one",
        where=str(path),
        hint="--load outputs/NNN-NAME; --ckpt-path takes weights alone",
    )
