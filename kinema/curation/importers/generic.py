"""Layouts that many data sets have: WebDataset, a Hugging Face folder, any table."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pa_parquet

from kinema.config.errors import KinemaError
from kinema.curation.importers.archives import (
    bytes_column,
    extract_parquet,
    extract_tars,
    is_tar,
)
from kinema.curation.importers.columns import as_text, join
from kinema.curation.importers.dataset import SIZES, Form, Request
from kinema.curation.importers.findings import Findings
from kinema.curation.importers.folders import load_sidecars
from kinema.curation.importers.source_tables import HINT, read_source
from kinema.data.tables import readable_parquet

PATH_COLUMNS = (
    "path", "video_path", "file_path", "filepath", "file_name", "filename", "video", "videos",
    "file", "clip_path", "clip", "video_file", "video_name", "mp4", "media_path", "videoid",
    "video_id", "clip_id", "id", "key",
)  # fmt: skip
"""Names that a column of files may have, the surest first."""
TEXT_COLUMNS = (
    "text", "caption", "captions", "prompt", "cap", "description", "dense_caption",
    "detailed_caption", "long_caption", "sentence", "title", "name", "label",
)  # fmt: skip
SURE = frozenset({"path", "file", "file_name", "video", "text", "caption"})
SIZE_COLUMNS = {
    "num_frames": ("num_frames", "frames", "frame_count", "n_frames", "frame_number", "frame"),
    "height": ("height", "h"),
    "width": ("width", "w"),
    "fps": ("fps", "frame_rate", "framerate"),
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def extract_folder(request: Request, source: Path) -> Path:
    """Where the videos of archives go.

    Raises:
        KinemaError: nobody said.
    """
    folder = request.extract or request.videos
    if folder is None:
        raise KinemaError(
            "its videos must be extracted to be trained on",
            where=str(source),
            hint="say where: --extract FOLDER (as much room as the archives have)",
        )
    return folder


def load_webdataset(request: Request, findings: Findings) -> pa.Table:
    """Tars, folders of tars, or a folder of extracted shards."""
    tars: list[Path] = []
    folders: list[Path] = []
    for source in request.sources:
        if source.is_dir():
            found = sorted(path for path in source.rglob("*") if is_tar(path) and path.is_file())
            tars += found
            folders += [] if found else [source]
        elif source.is_file():
            tars.append(source)
        else:
            raise KinemaError("does not exist", where=str(source))
    if (folders and tars) or len(folders) > 1:
        raise KinemaError("give tars, or one folder of extracted samples", where=str(folders[0]))
    if folders:
        return load_sidecars(folders[0], findings)
    return extract_tars(tars, extract_folder(request, tars[0]), findings)


def load_hugging_face(request: Request, findings: Findings) -> pa.Table:
    """A folder with `metadata.csv`/`.jsonl`/`.parquet` (one per split), or Parquet with videos."""
    tables: list[pa.Table] = []
    for source in request.sources:
        if source.is_file():
            tables.append(_metadata_or_videos([source], source.parent, request, findings))
            continue
        if not source.is_dir():
            raise KinemaError("does not exist", where=str(source))
        metadata = sorted(path for name in METADATA for path in source.rglob(name))
        parquet = sorted(source.rglob("*.parquet")) if not metadata else []
        if not metadata and not parquet:
            raise KinemaError(
                f"has neither {', '.join(METADATA)} nor Parquet files",
                where=str(source),
                hint="a folder of videos without captions: kinema data index FOLDER",
            )
        if metadata:
            tables += [_metadata(path, source, request, findings) for path in metadata]
        else:
            tables.append(_metadata_or_videos(parquet, source, request, findings))
    return pa.concat_tables(tables, promote_options="permissive")


def _metadata(path: Path, root: Path, request: Request, findings: Findings) -> pa.Table:
    """`file_name` counts from the metadata's own folder."""
    table = read_source(path, findings, encoding=request.encoding)
    names = ("file_name", "file", "video", "path", "video_path")
    for name in (request.path_column,) if request.path_column else names:
        if name in table.column_names:
            below = path.parent.relative_to(root)
            prefix = "" if str(below) == "." else f"{below}/"
            files = join(prefix, as_text(table.column(name)))
            table = table.set_column(table.column_names.index(name), "file", files)
            split = below.parts[0] if below.parts else ""
            if split and "split" not in table.column_names:
                column = pa.repeat(pa.scalar(split, pa.large_string()), table.num_rows)
                table = table.append_column("split", column)
            return table
    raise KinemaError(
        f"has no column 'file_name' (it has {', '.join(table.column_names)})", where=str(path)
    )


def _metadata_or_videos(
    paths: list[Path], root: Path, request: Request, findings: Findings
) -> pa.Table:
    if paths[0].suffix.lower() != ".parquet":
        return pa.concat_tables([_metadata(path, root, request, findings) for path in paths])
    with readable_parquet(paths[0], HINT), pa_parquet.ParquetFile(paths[0]) as file:
        column = bytes_column(file.schema_arrow)
    if column:
        return extract_parquet(paths, column, extract_folder(request, paths[0]), findings)
    parts = [_metadata(path, root, request, findings) for path in paths]
    return pa.concat_tables(parts, promote_options="permissive")


def guess_form(
    table: pa.Table, request: Request, where: str
) -> tuple[Form, str | None, tuple[str, ...]]:
    """The layout of a table nobody described: which column is the file, which the caption.

    Returns:
        The form, the caption's column, what was guessed (for the person).

    Raises:
        KinemaError: a column that was named is not there; none looks like files.
    """
    names = {name.lower(): name for name in reversed(table.column_names)}
    notes: list[str] = []

    def pick(asked: str | None, guesses: tuple[str, ...], option: str) -> str | None:
        if asked is not None:
            if asked not in table.column_names:
                raise KinemaError(
                    f"has no column {asked!r} (it has {', '.join(table.column_names)})",
                    where=where,
                    hint=f"{option} with one of these",
                )
            return asked
        found = next((names[guess] for guess in guesses if guess in names), None)
        if found is not None and found.lower() not in SURE:
            notes.append(f"column {found!r} taken ({option} says another)")
        return found

    path = pick(request.path_column, PATH_COLUMNS, "--path-column")
    if path is None:
        raise KinemaError(
            f"no column looks like file names (it has {', '.join(table.column_names)})",
            where=where,
            hint="name it: --path-column COLUMN",
        )
    text = pick(request.text_column, TEXT_COLUMNS, "--text-column")
    text = None if text == path else text
    if text is None:
        notes.append("no column looks like captions (--text-column names one)")
    sizes = {
        ours: names[guess]
        for ours in SIZES
        for guess in [next((g for g in SIZE_COLUMNS[ours] if g in names), "")]
        if guess
    }
    form = Form(
        needed=(path,),
        text=(text,) if text else (),
        clips=(f"{{{path}}}",),
        sizes=sizes,
        all_columns=True,
    )
    return form, text, tuple(notes)
