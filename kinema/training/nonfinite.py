"""A loss or gradient that is not a number stops the run before it can spoil the weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kinema.config.errors import KinemaError

SHOWN_CLIPS = 8


class NonFiniteError(KinemaError):
    """The loss or the gradients of a step are not finite; raised on every rank alike."""


@dataclass(frozen=True)
class Offender:
    """A rank whose part of a step was not finite.

    Attributes:
        loss: of the first micro-batch that was not finite, or of the last one.
        gradient_norm: of this rank's own gradients.
        rows: rows of the manifest in the micro-batches at fault; all of the rank's in this step
            if only the gradients were not finite.
        paths: their files.
    """

    rank: int
    loss: float
    gradient_norm: float
    bucket: str
    rows: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def write_report(path: Path, step: int, offenders: list[Offender]) -> None:
    """Save which clips were at fault."""
    text = json.dumps({"step": step, "ranks": [asdict(o) for o in offenders]}, indent=1)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def error(step: int, offenders: list[Offender], *, where: str, report: Path) -> NonFiniteError:
    """The message that names step, ranks and clips."""
    parts = []
    for one in offenders:
        names = ", ".join(one.paths[:SHOWN_CLIPS])
        more = f" and {len(one.paths) - SHOWN_CLIPS} more" if len(one.paths) > SHOWN_CLIPS else ""
        parts.append(
            f"rank {one.rank} (loss {one.loss:g}, gradient norm {one.gradient_norm:g}, "
            f"{one.bucket}): {names}{more}"
        )
    return NonFiniteError(
        f"loss or gradients are not finite at step {step}; no update was made. " + "; ".join(parts),
        where=where,
        hint=f"look at these clips (rows in {report.name}); drop them from the manifest, or lower "
        "optim.lr, then continue with --load",
    )
