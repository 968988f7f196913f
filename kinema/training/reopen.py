"""The checkpoint that a run goes on from: read whole before anything is built on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kinema.checkpoint.errors import CheckpointError
from kinema.checkpoint.folder import Checkpoint, checkpoint_folders
from kinema.parallel.world import World


def open_verified(path: Path, world: World) -> Checkpoint:
    """A checkpoint by its folder, or the newest sound one of a run folder. Collective.

    Every file is hashed again, each by one of the ranks: together they read the checkpoint once,
    which takes no longer than loading it. All ranks get the same one.

    Returns:
        The checkpoint; its `warnings` name newer ones that were passed over, and why.

    Raises:
        CheckpointError: none, or not sound; names the files, and the ranks that wrote them.
    """
    # As rank 0 sees the folder: a copy may be on its way.
    folders = world.broadcast(checkpoint_folders(path))
    passed_over: list[str] = []
    for folder in folders or [path]:
        checkpoint, problem = _verified(folder, world)
        problems = [p for p in world.gather(problem) if p is not None]
        if not problems:
            assert checkpoint is not None
            return replace(checkpoint, warnings=tuple(passed_over))
        if folder == path:
            raise problems[0]
        passed_over.append(f"{folder.name} is passed over: {problems[0].what}")
    raise CheckpointError(
        f"none of its {len(folders)} checkpoints is whole; {passed_over[0]}", where=str(path)
    )


def _verified(folder: Path, world: World) -> tuple[Checkpoint | None, CheckpointError | None]:
    try:
        checkpoint = Checkpoint.open(folder)
        share = (world.rank, world.size)
        if world.is_main:
            checkpoint.verify_shown(share)
        else:
            checkpoint.verify(hashes=True, share=share)
    except CheckpointError as error:
        return None, error
    return checkpoint, None
