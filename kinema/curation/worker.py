"""What a worker process does: opens a stage once, then runs batch after batch."""

from __future__ import annotations

import errno
import pickle
import threading
import time
from collections.abc import Sequence
from typing import Any

from kinema.config.errors import KinemaError
from kinema.curation.stage import Bad, Part, Places, Result, Row, Stage, Work

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_opened: dict[bytes, tuple[Stage, Work]] = {}
"""Stages that this process has opened, by their pickles."""
_opening = threading.Lock()
"""Several threads may call the same stage: it is opened once, with one budget."""


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
        A result per row, as plain values of the columns' types, and the seconds that finding them
        took.

    Raises:
        KinemaError: the stage cannot be opened, or something other than a row is wrong (a full
            disk): it ends the run.
    """
    with _opening:
        if blob not in _opened:
            stage, places = pickle.loads(blob)  # noqa: S301 (of `packed`: the run's own process)
            _opened[blob] = stage, stage.open(places)
        stage, work = _opened[blob]
    start = time.perf_counter()
    try:
        results = work(rows)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise KinemaError(
            f"cannot be written: {error.strerror}",
            where=str(error.filename or label),
            hint="mend that; the same command goes on where it stopped",
        ) from None
    seconds = time.perf_counter() - start
    return checked(stage, rows, results), seconds


def checked(stage: Stage, rows: Sequence[Row], results: Any) -> list[Result]:
    """The results, when every row has all parts that were asked for: else the stage has a mistake.

    Values become what reading them back gives (a float32's, a list in place of an array), so that
    a later stage sees the same whether this one ran or was recalled.
    """
    assert len(results) == len(rows), f"{len(results)} results for {len(rows)} rows"
    parts = {part.name: part for part in stage.parts}
    checked: list[Result] = []
    for row, result in zip(rows, results, strict=True):
        asked = set(row["todo"])
        missing = asked - set(result)
        assert not missing, f"no answer for {sorted(missing)} of {row['path']}"
        checked.append(
            {
                name: found if isinstance(found, Bad) else _plain(parts[name], found, row)
                for name, found in result.items()
                if name in asked
            }
        )
    return checked


def _plain(part: Part, found: Any, row: Row) -> dict[str, Any]:
    import pyarrow as pa

    strange = sorted(set(found) - set(part.columns))
    assert not strange, f"part {part.name!r} does not have the columns {strange}"
    plain = {}
    for name, kind in part.columns.items():
        try:
            plain[name] = pa.scalar(found.get(name), kind).as_py()
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise TypeError(
                f"part {part.name!r} gave {name!r} of {row['path']} a value that is not of its "
                f"type, {kind}: {error}"
            ) from None
    return plain
