"""What a person gives to `kinema curate`, as rows of sources: folders, lists, tables, URLs."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kinema.config.errors import KinemaError
from kinema.curation.clips import column_of
from kinema.curation.stage import row_id
from kinema.data.captions import Captions, find_captions, find_stored_captions
from kinema.data.find_media import Refusal, find_media
from kinema.data.tables import ENDINGS, fetched, read_table
from kinema.media.info import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from kinema.media.stores import (
    files_below,
    is_url,
    join,
    of_each,
    parent,
    read_bytes,
    suffix,
    version_in_store,
)
from kinema.telemetry.progress import Progress

PATH_COLUMNS = ("path", "video", "file_name")
LIST_ENDING = ".txt"
MADE = ("clips", "frames")
"""Folders of a run that hold what it made."""
RUN_MARK = "stages/format.json"
"""What every folder of a curation run has, from its beginning."""
OURS = frozenset({"id", "state", "path", "dropped_by"})
"""Columns of a table that every run makes anew."""


@dataclass
class Inputs:
    """What was found."""

    table: pa.Table
    """`id`, `state`, `path`, `name` (what people call it: below the input), sorted by `id`; with
    `text` and `_cuts` where they were given, and the other columns of tables."""
    refused: list[Refusal] = field(default_factory=list)
    images: int = 0
    """Images, which are not curated: there is nothing to cut."""
    given_twice: int = 0
    made: int = 0
    """Videos in the folders of curation runs: clips that such runs made."""


@dataclass
class _Found:
    path: str
    name: str
    columns: dict[str, Any] = field(default_factory=dict)
    state: str | None = None
    """Where it is known already."""


def find_inputs(
    inputs: Sequence[str],
    *,
    captions: str | None = None,
    data_root: str | None = None,
    out: str | None = None,
) -> Inputs:
    """Rows for all videos that `inputs` name.

    Args:
        inputs: folders (everything below them), videos, `.txt` lists of paths (one a line), `.csv`
            or `.parquet` tables (manifests, cut lists, any with a column `path`), and URLs of
            stores of all these.
        captions: a table of captions for the videos of folders (`find_captions`).
        data_root: the folder that paths in lists and tables are below; default: their own.
        out: where the run writes; what is found there in a folder that was given is its own work.

    Raises:
        KinemaError: an input is not there or has no videos.
    """
    found: list[_Found] = []
    result = Inputs(pa.table({}))
    for text in inputs:
        before = len(found)
        found += _look(text, captions, data_root, result, out)
        if len(found) == before and not result.refused:
            images = f", only {result.images} images" if result.images else ""
            made = f", only {result.made} clips of a curation run" if result.made else ""
            raise KinemaError(
                f"has no videos{images}{made}",
                where=text,
                hint="give a folder with videos, a list of them (.txt) or a table (.csv, .parquet)",
            )
    rows: dict[str, dict[str, Any]] = {}
    firsts: dict[str, _Found] = {}
    for item in found:
        firsts.setdefault(item.path, item)
    result.given_twice = len(found) - len(firsts)
    once = list(firsts.values())
    for item, state in zip(once, _states(once), strict=True):
        size = int(state.partition(":")[0] or 0)
        identity = row_id(item.name, size)
        if identity in rows:  # another file of this name and size
            identity = row_id(item.path, size)
        own = {"id": identity, "state": state, "path": item.path, "name": item.name}
        rows[identity] = item.columns | own
    result.table = _table([rows[identity] for identity in sorted(rows)])
    return result


def _look(
    text: str, captions: str | None, data_root: str | None, result: Inputs, out: str | None
) -> list[_Found]:
    ending = suffix(text)
    if ending == LIST_ENDING:
        return _listed(text, data_root)
    if ending in ENDINGS:
        return _tabled(text, data_root)
    if is_url(text):
        return _stored(text, captions, result, out)
    path = Path(os.path.abspath(text))
    if path.is_dir():
        return _below(path, captions, result, out)
    if not path.exists():
        raise KinemaError("does not exist", where=text)
    return [_Found(str(path), path.name)]


def _below(folder: Path, captions: str | None, result: Inputs, out: str | None) -> list[_Found]:
    files, refused = find_media(folder)
    result.refused += refused
    files = _without_runs(folder, files, result, out)
    videos = [name for name in files if suffix(name) not in IMAGE_SUFFIXES]
    result.images += len(files) - len(videos)
    texts = find_captions(folder, videos, captions, folder)
    result.refused += texts.unused
    return [
        _Found(str(folder / name), f"{folder.name}/{name}", _captioned(texts, name))
        for name in videos
    ]


def _without_runs(folder: Path, files: list[str], result: Inputs, out: str | None) -> list[str]:
    """Leave out the clips (and strips of frames) that runs made below `folder`, or in it where it
    is `out`: every further run would else cut the clips of the one before."""
    runs: dict[str, bool] = {}

    def made(name: str) -> bool:
        parts = name.split("/")
        for place, part in enumerate(parts[:-1]):
            if part in MADE:
                run = os.path.join(folder, *parts[:place])
                if run not in runs:
                    own = run == out
                    runs[run] = own or (place > 0 and os.path.isfile(f"{run}/{RUN_MARK}"))
                if runs[run]:
                    return True
        return False

    kept = [name for name in files if not made(name)]
    left_out = set(files) - set(kept)
    result.made += sum(suffix(name) not in IMAGE_SUFFIXES for name in left_out)
    return kept


def _captioned(captions: Captions, name: str) -> dict[str, Any]:
    return {"text": captions.texts[name]} if captions.texts.get(name) else {}


def _stored(url: str, captions: str | None, result: Inputs, out: str | None) -> list[_Found]:
    try:
        below = files_below(url)
    except FileNotFoundError:
        below = {}
    except OSError as error:
        raise KinemaError(f"cannot be listed: {error.strerror or error}", where=url) from None
    if not below:
        raise KinemaError("does not exist, or is empty", where=url)
    if "" in below:
        return [_Found(url, url.rsplit("/", 1)[-1], state=below[""] or None)]
    seen = [name for name in below if "/." not in f"/{name}"]
    base = url.rstrip("/")
    # Of a run that is in `url` itself, its mark is no sign: its clips may be what is wanted.
    runs = [f"{base}/{n.removesuffix(f'/{RUN_MARK}')}" for n in below if n.endswith(f"/{RUN_MARK}")]
    made = tuple(f"{run}/{folder}/" for run in {*runs, out} for folder in MADE)
    outside = [name for name in seen if not f"{base}/{name}".startswith(made)]
    result.made += sum(suffix(name) in VIDEO_SUFFIXES for name in {*seen} - {*outside})
    seen = outside
    result.images += sum(suffix(name) in IMAGE_SUFFIXES for name in seen)
    videos = [name for name in seen if suffix(name) in VIDEO_SUFFIXES]
    texts = find_stored_captions(base, below, videos, captions)
    result.refused += texts.unused
    folder = posixpath.basename(base)
    return [
        _Found(f"{base}/{name}", f"{folder}/{name}", _captioned(texts, name), below[name] or None)
        for name in videos
    ]


def _listed(text: str, data_root: str | None) -> list[_Found]:
    try:
        lines = read_bytes(text).decode("utf-8").splitlines()
    except FileNotFoundError:
        raise KinemaError("does not exist", where=text) from None
    except UnicodeDecodeError:
        raise KinemaError("is not a list of paths in UTF-8", where=text) from None
    names = [line.strip() for line in lines]
    root = data_root or parent(text)
    return [
        _Found(_absolute(join(root, name)), name)
        for name in names
        if name and not name.startswith("#")
    ]


def _tabled(text: str, data_root: str | None) -> list[_Found]:
    types = dict.fromkeys((*PATH_COLUMNS, "text", "_cuts"), pa.large_string())
    table = read_table(fetched(text), types, hint="give a table with a column path")
    named = [name for name in PATH_COLUMNS if name in table.column_names]
    if not named:
        raise KinemaError(
            f"has no column 'path' (it has {', '.join(table.column_names)})",
            where=text,
            hint="`kinema data import` makes one of a data set's own table",
        )
    if "dropped_by" in table.column_names:  # clips that a manifest leaves out stay left out
        kept = pc.equal(pc.fill_null(table.column("dropped_by").cast(pa.large_string()), ""), "")
        table = table.filter(kept)
    root = data_root or parent(text)
    columns = [n for n in table.column_names if n not in OURS and n != named[0]]
    rows = table.select([named[0], *columns]).to_pylist()
    found = []
    for number, row in enumerate(rows):
        name = row.pop(named[0])
        if not name or os.path.normpath(name).split("/")[0] == "..":
            raise KinemaError(
                f"row {number}: the path {name!r} is empty or leaves the folder",
                where=text,
                hint="give the folder that all paths are below as --data-root",
            )
        found.append(_Found(_absolute(join(root, name)), name, row))
    return found


def _absolute(place: Path | str) -> str:
    return place if isinstance(place, str) else os.path.abspath(place)


def _states(found: Sequence[_Found]) -> list[str]:
    """What changes with each file, its size in bytes first; of a file that is not there: nothing,
    which decoding will say in its own words."""
    states = [item.state for item in found]
    stored = [i for i, item in enumerate(found) if item.state is None and is_url(item.path)]
    if stored:
        with Progress("looking up files", total=len(stored), unit="file") as bar:
            urls = [found[i].path for i in stored]
            for i, state in zip(stored, of_each(_stored_state, urls), strict=True):
                states[i] = state
                bar.advance()
    return [
        _local_state(item.path) if state is None else state
        for item, state in zip(found, states, strict=True)
    ]


def _stored_state(url: str) -> str:
    try:
        return version_in_store(url)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return ""
    except OSError as error:  # so would be the next million
        raise KinemaError(
            f"cannot be looked up: {error.strerror or error}",
            where=url,
            hint="see that the store can be reached; then run the same command again",
        ) from None


def _local_state(path: str) -> str:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    names: dict[str, None] = dict.fromkeys(("id", "state", "path", "name"))
    for row in rows:
        names |= dict.fromkeys(row)
    columns = {name: column_of([row.get(name) for row in rows]) for name in names}
    text = ("id", "state", "path", "name", "text", "_cuts")
    return pa.table({n: c.cast(pa.large_string()) if n in text else c for n, c in columns.items()})
