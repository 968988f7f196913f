"""What an importer is: a description of how a data set was published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from kinema.curation.importers.columns import fields
from kinema.curation.importers.findings import Findings

SIZES = ("num_frames", "height", "width", "fps")


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    sources: tuple[Path, ...]
    videos: Path | None = None
    """Folder of the videos; None: the source, or the folder it lies in."""
    extract: Path | None = None
    """Folder that archives are extracted to."""
    encoding: str = "utf-8"
    text_column: str | None = None
    path_column: str | None = None


@dataclass(frozen=True)
class Ranges:
    """How a row names a part of a longer video.

    Files are templates over the table's columns, `"{youtuber}/{videoid}"`, without an ending: any
    that videos have.
    """

    sources: tuple[str, ...]
    start: str
    """Column with seconds or `H:MM:SS.mmm`."""
    end: str
    whole: bool = False
    """Whether a row without times means the whole video, its parts unknown."""


@dataclass(frozen=True)
class Form:
    """One layout of a data set's tables."""

    needed: tuple[str, ...]
    """Columns that tell this layout from others; a table without one is refused."""
    text: tuple[str, ...] = ()
    """Columns with the caption: the first that is there."""
    clips: tuple[str, ...] = ()
    """Templates of the clips' files, in the order in which they are tried."""
    ranges: tuple[Ranges, ...] = ()
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Published column of scores -> our name."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Published column of text -> our name."""
    sizes: Mapping[str, str] = field(default_factory=dict)
    """Our `num_frames`, `height`, `width`, `fps` -> published column."""
    source: str | None = None
    """Template of the id of the video that a clip was cut from."""
    source_end: str | None = None
    """Regular expression: what is cut off the clip's name to get the id of its source."""
    source_min: int = 1
    """Characters of the shortest id; where less is left, nothing is cut off."""
    all_columns: bool = False
    """Keep every column that has no other use, under its own name."""

    def used(self) -> set[str]:
        """Published columns that this form has a use for."""
        templates = [*self.clips, *(s for r in self.ranges for s in r.sources), self.source or ""]
        times = {name for r in self.ranges for name in (r.start, r.end)}
        named = {name for template in templates for name in fields(template)}
        return {*self.needed, *self.text, *times, *named, *self.sizes.values()}

    def trusted(self) -> bool:
        """Whether the table says all that probing finds out."""
        return set(self.sizes) == set(SIZES)


Loader = Callable[[Request, Findings], pa.Table]
"""Reads the sources of a data set that are not simply tables: one row per clip."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set, or a layout that many have."""

    name: str
    """As on the command line."""
    title: str
    line: str
    """One line for `--list`: what SOURCE is."""
    forms: tuple[Form, ...]
    published: tuple[tuple[str, ...], ...] = ()
    """Columns that tell its tables from others, where they are not what the forms need: each the
    columns of one kind of table."""
    aliases: tuple[str, ...] = ()
    unique_names: bool = False
    """Whether a file's name alone says which clip it is."""
    load: Loader | None = None
    numbered: bool = True
    """Whether rows are those of the tables, so that their numbers help to find them."""
    folders: bool = False
    """Whether SOURCE may be a folder of videos without a table."""

    def signs(self) -> list[tuple[str, ...]]:
        """The columns by which its tables are told."""
        return list(self.published or [form.needed for form in self.forms])


@dataclass(frozen=True)
class Rows:
    """The rows of all sources, in the layout they have."""

    table: pa.Table
    form: Form
    text: str | None
    """The column that captions come from."""
    notes: tuple[str, ...] = ()
    """What was guessed, for the person."""
