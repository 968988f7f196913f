"""One page about a curation run: what ran, what became of the videos, and what it cost.

`RunSummary` is what the run itself knows and the manifest does not: stages, times, tokens. The
pipeline fills it and keeps it as `OUT/run.json`; `write_report` puts it together with the manifest
and the refused files into `OUT/report.html`, during the run or any time later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinema.config.errors import KinemaError
from kinema.curation.files import new_file
from kinema.curation.stage import Places
from kinema.data.writing import writing
from kinema.media.stores import Place, join, read_bytes

RUN_FILE = "run.json"
VERSION = 1


@dataclass(frozen=True)
class StageSummary:
    """What one stage did in this run."""

    name: str
    """`look`, `cut`, `aesthetic`, `caption`, ...: `Stage.name`."""
    computed: int = 0
    """Rows that were worked out."""
    recalled: int = 0
    """Rows whose results were kept from an earlier run."""
    bad: int = 0
    """Rows answered with `Bad`, of both kinds above."""
    worker_s: float = 0.0
    """Seconds that workers spent in the stage, added up over workers (core-seconds of a CPU stage
    whose workers have one thread)."""
    wall_s: float = 0.0
    """Seconds from its first call to the end of its last one."""
    video_hours: float = 0.0
    """Hours of video in the computed rows."""
    level: str = "clips"
    """What its rows are: `sources` or `clips`."""
    workers: int = 1
    """Processes that ran it."""
    gpu: bool = False
    """Whether it ran on a GPU: `worker_s` is GPU-seconds then."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """`Bad.reason` -> rows."""


@dataclass(frozen=True)
class Count:
    """One level of the funnel above the rules."""

    name: str
    """`files given`, `videos readable`, `scenes`, `clips`."""
    rows: int
    hours: float | None = None
    """Hours of video, where they are known."""


@dataclass(frozen=True)
class Tokens:
    """What captions used of a model."""

    model: str
    input: int = 0
    output: int = 0
    requests: int = 0
    failed: int = 0
    """Requests that gave no answer after all retries."""
    cost: float | None = None
    """In `currency`; None where no price was given."""
    currency: str = "USD"


@dataclass(frozen=True)
class RunSummary:
    """What a curation run did; `OUT/run.json`.

    Counts are of the whole folder as the manifest has it; stage times are of the run that wrote it
    (`recalled` rows cost nothing again).
    """

    started: str
    """ISO 8601 with a zone: `2026-11-21T18:30:00+00:00`."""
    wall_s: float
    """Seconds of the whole run."""
    inputs: Sequence[str] = ()
    """As they were given on the command line."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """`CurateRecipe` as plain values."""
    recipe_name: str = ""
    """Name or file of the recipe, `""` for the defaults."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """`kinema`, `python`, `av`, ..., and models by their column."""
    counts: Sequence[Count] = ()
    """The funnel from files to clips, in order; what the rules dropped is in the manifest."""
    rules: Sequence[str] = ()
    """Expressions in the order they were applied (the preset's first), as `dropped_by` has them
    after `filter: `."""
    stages: Sequence[StageSummary] = ()
    """In the order they ran."""
    tokens: Sequence[Tokens] = ()
    """One per captioning model."""
    engine: str = "local"
    """`local` or `ray`."""
    cores: int | None = None
    machine: str = ""
    """What it ran on, in words for people: `2 cores, no GPU`."""
    finished: bool = True
    """False when the run was interrupted and the numbers are of a part."""

    def to_json(self) -> str:
        """The text of `run.json`."""
        values = {"version": VERSION} | dataclasses.asdict(self)
        return json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = RUN_FILE) -> RunSummary:
        """The summary of a `run.json`; keys of later versions are passed over.

        Raises:
            KinemaError: it is not one.
        """
        try:
            data = json.loads(text)
            inner = {"counts": Count, "stages": StageSummary, "tokens": Tokens}
            lists = {k: tuple(_of(v, item) for item in data.get(k, ())) for k, v in inner.items()}
            lists |= {name: tuple(data.get(name, ())) for name in ("inputs", "rules")}
            summary: RunSummary = _of(cls, data | lists)
        except (ValueError, TypeError, AttributeError) as error:
            raise KinemaError(
                f"is not a run's summary: {error}",
                where=where,
                hint="run `kinema curate` again: finished work is kept",
            ) from None
        return summary

    def write(self, out: str | Path | Places) -> Place:
        """Write `OUT/run.json`."""
        return _write(join(_folder(out), RUN_FILE), self.to_json())

    @classmethod
    def read(cls, out: str | Path | Places) -> RunSummary:
        """Read `OUT/run.json`.

        Raises:
            KinemaError: there is none, or it is not one.
        """
        place = join(_folder(out), RUN_FILE)
        try:
            content = read_bytes(place).decode("utf-8", "replace")
        except FileNotFoundError:
            raise KinemaError(
                "has no run.json: this is not the folder of a curation run",
                where=_folder(out),
                hint="give the folder that `kinema curate INPUT -o FOLDER` wrote",
            ) from None
        return cls.from_json(content, where=str(place))


def write_report(
    out: str | Path | Places,
    *,
    summary: RunSummary | None = None,
    manifest: str | Path | None = None,
    refused: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Place:
    """Write `OUT/report.html`: one page that needs no other file.

    Args:
        out: the folder of a run, or its URL in a store.
        summary: default: that in `OUT/run.json`.
        manifest: default: `OUT/manifest.parquet`.
        refused: `path`, `reason`, `message` of each file that gave nothing; default: the lines of
            `OUT/refused.jsonl`.
        seed: of the random samples.

    Returns:
        Where the page is.

    Raises:
        KinemaError: there is no such run or manifest; the page cannot be written.
    """
    from kinema.curation.report_page import make_page

    folder = _folder(out)
    html = make_page(
        folder,
        summary or RunSummary.read(out),
        join(folder, "manifest.parquet") if manifest is None else manifest,
        _refused(join(folder, "refused.jsonl")) if refused is None else refused,
        seed,
    )
    return _write(join(folder, "report.html"), html)


def _of(kind: type[Any], data: Mapping[str, Any]) -> Any:
    names = {item.name for item in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in data.items() if name in names})


def _folder(out: str | Path | Places) -> str:
    return out.out if isinstance(out, Places) else str(out).rstrip("/")


def _write(place: Place, content: str) -> Place:
    with writing(str(place)), new_file(str(place)) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return place


def _refused(place: Place) -> list[dict[str, Any]]:
    try:
        lines = read_bytes(place).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            item = json.loads(line)
            if isinstance(item, dict):
                found.append(item)
    return found
