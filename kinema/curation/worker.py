"""What a worker process does: opens a stage once, then runs batch after batch."""

from __future__ import annotations

import errno
import pickle
import time
from collections.abc import Sequence
from typing import Any

from kinema.config.errors import KinemaError
from kinema.curation.stage import Places, Result, Row, Stage, Work

_opened: dict[bytes, Work] = {}
"""Stages that this process has opened, by their pickles."""


def packed(stage: Stage, places: Places) -> bytes:
    """A stage as it travels to workers."""
    return pickle.dumps((stage, places))


def run_batch(label: str, blob: bytes, rows: Sequence[Row]) -> tuple[list[Result], float]:
    """One batch of a stage, in whatever process this is.

    Args:
        label: what messages call the batch: its first row's path.
        blob: of `packed`, by this program itself.
        rows: with `todo`.

    Returns:
        A result per row, and the seconds that finding them took.

    Raises:
        KinemaError: the stage cannot be opened, or something other than a row is wrong (a full
            disk): it ends the run.
    """
    work = _opened.get(blob)
    if work is None:
        stage, places = pickle.loads(blob)  # noqa: S301 (made by `packed`, in the run's own process)
        work = _opened[blob] = stage.open(places)
    start = time.perf_counter()
    try:
        results = work(rows)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise KinemaError(
            f"cannot be written: {error.strerror}",
            where=str(error.filename or label),
            hint="mend that; the same command goes on where it stopped",
        ) from None
    seconds = time.perf_counter() - start
    check(rows, results)
    return results, seconds


def check(rows: Sequence[Row], results: Any) -> None:
    """Every row is answered, and every part that was asked for: else the stage has a mistake."""
    assert len(results) == len(rows), f"{len(results)} results for {len(rows)} rows"
    for row, result in zip(rows, results, strict=True):
        missing = set(row["todo"]) - set(result)
        assert not missing, f"no answer for {sorted(missing)} of {row['path']}"
