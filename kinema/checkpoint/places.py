"""Where published weights are, as plain values (no torch, no network)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HubFiles:
    """Files of one repository of the model hub."""

    repo: str
    """`owner/name`."""
    files: tuple[str, ...]
    """Paths inside it, all needed. The first is the file of weights, or lies in the folder that is
    handed on. An `.index.json` brings its shards."""
    optional: tuple[str, ...] = ()
    """Taken where the repository has them."""
    revision: str | None = None
    """Commit, tag or branch; None: the newest of the main branch."""
    verified: str = ""
    """How repository and file names are known. Nothing was downloaded when this was written."""
    elsewhere: str | None = None
    """Another address of the same weights, to fetch by hand."""

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class Wanted:
    """One part of a pipeline, and where a person or its authors say that it is."""

    what: str
    """In words: `the autoencoder`."""
    flag: str
    """What a person gives its place with."""
    published: HubFiles
    given: str | Path | None = None
    """A path, `owner/repository`, or `owner/repository/file`, with `@revision` if wanted; None:
    as published."""
    within: str = ""
    """Where this part is in a folder of diffusers' that holds a whole pipeline."""
    folder: bool = False
    """The folder of the files is handed on, not the first file."""
