"""The selection of the page as a manifest of its own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest
from kinema.data.tables import ENDINGS
from kinema.media.stores import is_url
from kinema.serving.browse.query import ClipTable, Query, Rows


def selected(clips: ClipTable, query: Query, *, marked: bool) -> Rows:
    """The rows to export: what the page shows in its order, or all marked ones.

    Raises:
        KinemaError: there are none.
    """
    if marked:
        rows: Rows = np.array(sorted(clips.edits.marked), np.int64)
    else:
        rows = clips.rows(query)
    if not len(rows):
        raise KinemaError(
            "no clip is marked" if marked else "no clip is shown",
            hint="mark clips with m" if marked else "loosen the filters",
        )
    return rows


def write_selection(clips: ClipTable, rows: Rows, path: Path) -> None:
    """Write rows as a manifest, captions as edited, paths as they are in the manifest."""
    root = clips.manifest.root
    Manifest(clips.table.take(rows), root, source=str(path)).write(path, data_root=root)


def target(manifest: str, name: str, *, replace: bool) -> Path:
    """The file beside the manifest that a selection may be written to.

    Args:
        manifest: path of the manifest that is looked at.
        name: a plain file name.
        replace: whether a file of that name may be replaced; never the manifest itself.

    Raises:
        KinemaError: another folder, another ending, a file that is there.
    """
    if is_url(manifest):
        raise KinemaError(
            "the manifest is in a store, where the page writes nothing", hint="download it instead"
        )
    plain = name == os.path.basename(name) and name.isprintable() and not name.startswith(".")
    if not plain or "\\" in name or not name:
        raise KinemaError(
            f"{name!r} is no plain file name", hint="it is written beside the manifest"
        )
    if os.path.splitext(name)[1].lower() not in ENDINGS or len(name.encode()) > 200:
        raise KinemaError(f"{name!r} must end in .csv or .parquet", hint=f"{name}.parquet")
    source = Path(os.path.abspath(manifest))
    path = source.parent / name
    if path.exists() or path.is_symlink():
        if path.exists() and source.exists() and path.samefile(source):
            raise KinemaError(
                "this is the manifest that you are looking at", where=name, hint="another name"
            )
        if not replace or path.is_dir():
            raise KinemaError("is there already", where=name, hint="tick “replace”, or rename")
    return path
