"""Requests over the processes that torchrun started: who makes what, and under which name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from kinema.config.errors import KinemaError
from kinema.generation.clip import free_names
from kinema.generation.config import GenerateRequest
from kinema.parallel.world import World

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process that is done waits for the others: shares may differ by whole videos."""


class RankError(KinemaError):
    """A process of a run of several failed."""


def share(batches: Sequence[T], world: World) -> list[T]:
    """This process's share: every `size`-th batch.

    Whole batches, so that a video has the same company, and so the same rounding, whatever the
    number of processes.
    """
    return list(batches[world.rank :: world.size])


def choose_names(
    folder: Path,
    requests: Sequence[GenerateRequest],
    world: World,
    *,
    stems: Sequence[str] | None = None,
) -> list[Path]:
    """A free path for each request's clip, the same list on every process.

    The first process looks at the folder once, before anything is written, so that processes
    never take each other's names.

    Args:
        stems: see `free_names`.
    """
    names = free_names(folder, requests, stems) if world.is_main else None
    chosen: list[Path] = world.broadcast(names)
    return chosen


@contextmanager
def together(world: World) -> Iterator[None]:
    """For the time that each process works on its share: either all succeed, or all end.

    A process that fails ends at once with its number in the message, and torchrun stops the
    others; one that is done waits for the others, and ends with an error if one of them is gone.

    Raises:
        RankError: this process failed (its message), or another one did.
    """
    if world.size == 1:
        yield
        return
    try:
        yield
    except KinemaError as error:
        what = f"process {world.rank} of {world.size}: {error.what}"
        raise RankError(what, where=error.where, hint=error.hint) from error
    try:
        world.barrier()
    except RuntimeError:
        raise RankError(
            "another process of the run failed; its own message says why",
            where=f"process {world.rank} of {world.size}",
        ) from None
