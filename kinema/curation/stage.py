"""What a stage of curation is: a function of a batch of rows, and what names its results.

A *row* is a dict of plain values: one raw video (a *source*) or one clip. Every row has

- `id`: 32 hex digits, the same on every machine and in every run (`row_id`);
- `state`: what a changed file changes (size and modification time of the source);
- `path`: where it is: an absolute path, or the URL of a store;

and the columns that earlier stages gave. A stage has one or more *parts*: columns that are found
in one go (one decoding pass gives signals for scenes, motion and quality) but are kept, versioned
and asked for separately. What is known already is not asked for again: `row["todo"]` names the
parts that a call is to find.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bad:
    """Why a row has no result: a code to count by and a sentence for people."""

    reason: str
    """`corrupt`, `timeout`, `no_answer`, ...: a `MediaError` reason or a stage's own."""
    message: str
    passing: bool = False
    """Whether another run may succeed (an endpoint that failed): it is not remembered."""


Found = Mapping[str, Any] | Bad
"""The columns of one part of one row."""
Result = Mapping[str, Found]
"""Part name -> what was found, for every part in the row's `todo`."""
Work = Callable[[Sequence[Row]], list[Result]]
"""Results in the order of the rows. An exception is a mistake in code or set-up, never a bad
row: rows that cannot be used are answered with `Bad`."""


@dataclass(frozen=True)
class Part:
    """Columns that are found, versioned and kept together."""

    name: str
    columns: Mapping[str, pa.DataType]
    """What it gives. Names that begin with `_` are internal and not in a manifest."""
    made_by: Mapping[str, Any]
    """Settings and versions that results depend on, as JSON values: the code's own version number,
    thresholds, the hash of a model's files. Other values: results are found anew."""
    depends: tuple[str, ...] = ()
    """Columns whose values the result depends on (`text` for a match score)."""
    file: str | None = None
    """The column that names a file which the result is, below the run's folder; of an internal
    column (`_signals_scenes`), below `Places.signals`. Where the file is gone it is made anew: at
    once, or, of an internal column, when a later stage has something to find for the row."""

    @functools.cached_property
    def key(self) -> str:
        """16 hex digits that name this version of the part."""
        return digest(self.name, dict(self.made_by))[:16]


class Stage(Protocol):
    """A picklable description; a module that defines one imports without torch.

    A stage may have `max_workers` besides: how many processes of the whole run may work at it (one
    for an endpoint, whose pace and budget are kept there); None or no such attribute: any number.
    """

    @property
    def name(self) -> str: ...

    @property
    def parts(self) -> Sequence[Part]: ...

    @property
    def batch(self) -> int:
        """Rows of a call."""
        ...

    @property
    def gpu(self) -> bool:
        """Whether a call wants a GPU where there is one; such stages get workers of their own."""
        ...

    @property
    def threads(self) -> int:
        """Calls at once in one worker beside each other (waiting for an endpoint); mostly 1."""
        ...

    def time_limit_s(self, row: Row) -> float:
        """Seconds after which one row counts as hanging; a batch may take the sum."""
        ...

    def open(self, places: Places) -> Work:
        """Load what is needed (once per worker process) and give the function of a batch.

        Raises:
            KinemaError: set-up that a person has to mend (a model folder, a missing package): ends
                the run before rows are lost to it.
        """
        ...


@dataclass(frozen=True)
class Places:
    """Folders of a curation run, as paths or URLs of stores; all end without a slash."""

    out: str
    clips: str = field(default="")
    frames: str = field(default="")
    signals: str = field(default="")

    @classmethod
    def below(cls, out: str) -> Places:
        """The layout of a run's folder."""
        out = out.rstrip("/")
        return cls(out, f"{out}/clips", f"{out}/frames", f"{out}/signals")


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest(*values: Any) -> str:
    """64 hex digits of plain values (BLAKE2b of their canonical JSON)."""
    canonical = _CANONICAL.encode(values)
    return hashlib.blake2b(canonical.encode(), digest_size=32).hexdigest()


def row_id(*values: Any) -> str:
    """The `id` of a row: of a source its path below the input and its size, of a clip its
    source's id, first frame and end frame."""
    return digest(*values)[:32]


def result_key(row: Row, part: Part) -> str:
    """What a result is kept under: the part's version, the row, its state, what it depends on."""
    return digest(part.key, row["id"], row["state"], [row.get(name) for name in part.depends])[:32]
