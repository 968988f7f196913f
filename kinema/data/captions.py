"""Captions for files found in a folder: from a table, from text files beside them, or none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pyarrow as pa

from kinema.config.errors import KinemaError
from kinema.data.find_media import Refusal
from kinema.data.tables import fetched, read_table
from kinema.media.stores import is_url, join, of_each, parent, read_bytes

PATH_NAMES = ("path", "video")
TEXT_NAMES = ("text", "caption")
MAX_SIDECAR_BYTES = 64 * 1024


@dataclass
class Captions:
    """What was found, by a file's path relative to the indexed folder."""

    source: str
    """For the person: the table's name, `.txt files`, or `none`."""
    texts: dict[str, str] = field(default_factory=dict)
    unused: list[Refusal] = field(default_factory=list)
    """Captions that no file could take."""


def find_captions(
    folder: Path, files: list[str], table: Path | str | None, data_root: Path
) -> Captions:
    """Captions for `files` (paths relative to `folder`).

    Args:
        table: CSV or Parquet with the columns `path,text` or `video,caption`; its paths are
            absolute, or relative to `folder`, to `data_root` or to the table's own folder (the
            first that has the file). None: a `clip.txt` beside each `clip.mp4` where there is one.

    Raises:
        KinemaError: the table is unreadable, lacks a column, or none of it fits the files.
    """
    if table is not None:
        return _from_table(folder, files, table, data_root)
    return _from_sidecars(folder, files)


def find_stored_captions(
    folder: str, below: Mapping[str, str], files: list[str], table: Path | str | None
) -> Captions:
    """As `find_captions`, for a folder in a store.

    Args:
        below: all files of the folder (`files_below`).

    Raises:
        KinemaError: see `find_captions`.
        OSError, StoreError: a text file cannot be read now.
    """
    if table is not None:
        return _from_table(folder, files, table, folder)
    captions = Captions(source=".txt files")
    texts = {file: f"{PurePosixPath(file).with_suffix('')}.txt" for file in files}
    texts = {file: name for file, name in texts.items() if name in below}
    for name in texts.values():
        if int(below[name].partition(":")[0] or 0) > MAX_SIDECAR_BYTES:
            message = f"longer than {MAX_SIDECAR_BYTES} bytes"
            captions.unused.append(Refusal(name, "caption_unreadable", message))
    large = {item.path for item in captions.unused}
    texts = {file: name for file, name in texts.items() if name not in large}
    contents = of_each(read_bytes, [f"{folder.rstrip('/')}/{name}" for name in texts.values()])
    for (file, name), content in zip(texts.items(), contents, strict=True):
        try:
            captions.texts[file] = tidy(content.decode("utf-8-sig"))
        except ValueError as error:
            captions.unused.append(Refusal(name, "caption_unreadable", str(error)))
    if not captions.texts:
        captions.source = "none"
    return captions


def _from_table(
    folder: Path | str, files: list[str], table_path: Path | str, data_root: Path | str
) -> Captions:
    types = dict.fromkeys((*PATH_NAMES, *TEXT_NAMES), pa.large_string())
    table = read_table(fetched(table_path), types, hint="give a CSV with the columns path,text")
    path_name = _one_of(PATH_NAMES, table, table_path)
    text_name = _one_of(TEXT_NAMES, table, table_path)
    if not table.num_rows:
        raise KinemaError("has no rows", where=str(table_path))
    captions = Captions(source=str(table_path))
    wanted = set(files)
    own = parent(table_path)
    roots = (folder, data_root, own if is_url(own) else Path(os.path.abspath(own)))
    named = ""
    for path, text in zip(
        table.column(path_name).to_pylist(), table.column(text_name).to_pylist(), strict=True
    ):
        named = named or str(path)
        # Of URLs as well: they are taken for paths, all in the same way.
        places = [os.path.relpath(join(root, path or ""), folder) for root in roots]
        place = next((place for place in places if place in wanted), None)
        if place is None:
            captions.unused.append(Refusal(str(path), "caption_without_file", "no such file"))
        elif place in captions.texts:
            captions.unused.append(
                Refusal(str(path), "caption_repeated", "the file has a caption already")
            )
        else:
            captions.texts[place] = tidy(text)
    if files and not captions.texts:
        raise KinemaError(
            f"none of its {table.num_rows} paths is a file in {folder} "
            f"(it names {named!r}, there is {files[0]!r})",
            where=str(table_path),
            hint="give the folder that its paths are below as --data-root",
        )
    return captions


def _from_sidecars(folder: Path, files: list[str]) -> Captions:
    captions = Captions(source=".txt files")
    for file in files:
        sidecar = folder / Path(file).with_suffix(".txt")
        if not sidecar.is_file():
            continue
        name = str(sidecar.relative_to(folder))
        try:
            with sidecar.open("rb") as stream:
                data = stream.read(MAX_SIDECAR_BYTES + 1)
            if len(data) > MAX_SIDECAR_BYTES:
                raise ValueError(f"longer than {MAX_SIDECAR_BYTES} bytes")
            captions.texts[file] = tidy(data.decode("utf-8-sig"))
        except (OSError, ValueError) as error:
            captions.unused.append(Refusal(name, "caption_unreadable", str(error)))
    if not captions.texts:
        captions.source = "none"
    return captions


def tidy(text: object) -> str:
    """A caption on one line, without spaces at its ends."""
    return " ".join(str(text or "").split())


def _one_of(names: tuple[str, str], table: pa.Table, path: Path | str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise KinemaError(
        f"has no column {names[0]!r} or {names[1]!r} (it has {', '.join(table.column_names)})",
        where=str(path),
        hint="name the columns path,text or video,caption",
    )
