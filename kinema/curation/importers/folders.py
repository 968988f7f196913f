"""Data sets that are folders: the table is made of paths, lists and text files beside the clips."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from kinema.config.errors import KinemaError
from kinema.curation.importers.columns import as_text, text_array
from kinema.curation.importers.dataset import Request
from kinema.curation.importers.findings import Findings
from kinema.curation.importers.source_tables import plain_column, read_source
from kinema.data.captions import MAX_SIDECAR_BYTES
from kinema.data.find_media import find_media

MAX_JSON_BYTES = 8 << 20
"""Of one file beside a clip; downloaders write subtitles into it."""
MAX_JSON_COLUMNS = 64
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


def folder_of(request: Request) -> Path:
    """The folder of videos: --videos, or the source that is one.

    Raises:
        KinemaError: there is none.
    """
    folders = [source for source in request.sources if source.is_dir()]
    folder = request.videos or (folders[0] if folders else None)
    if folder is None:
        raise KinemaError(
            "the videos' folder is missing",
            where=str(request.sources[0]),
            hint="give it as --videos FOLDER",
        )
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise KinemaError(what, where=str(folder), hint="give the videos' folder")
    return folder


def _files_in(folder: Path) -> list[str]:
    files, _ = find_media(folder)
    if not files:
        raise KinemaError("has no videos", where=str(folder))
    return files


def load_ucf_101(request: Request, findings: Findings) -> pa.Table:
    """`CLASS/v_CLASS_g01_c02.avi`; lists (`trainlist01.txt`) choose and name a split.

    Columns: `file`, `text` (the class in words), `class`, `split`, `group` (25 videos per class
    that clips were cut from).
    """
    files = _files_in(folder_of(request))
    splits: dict[str, str] = {}
    for path in request.sources:
        if path.is_dir():
            continue
        split = "train" if "train" in path.name.lower() else "test"
        for line in _lines(path):
            name = line.split()[0].replace("\\", "/").rsplit("/", 1)[-1]
            splits[name] = split
    columns: dict[str, list[str]] = {n: [] for n in ("file", "text", "class", "split", "group")}
    seen: set[str] = set()
    for file in files:
        name = file.rsplit("/", 1)[-1]
        match = re.match(r"^v_(\w+?)_(g\d+)_c\d+\.\w+$", name)
        if splits and name not in splits:
            continue
        seen.add(name)
        if match is None:
            findings.add("no_name", file, "is not named v_CLASS_gNN_cNN")
            continue
        row = (file, class_in_words(match[1]), match[1], splits.get(name, ""),
               f"v_{match[1]}_{match[2]}")  # fmt: skip
        for column, value in zip(columns, row, strict=True):
            columns[column].append(value)
    findings.add_all("no_file", sorted(set(splits) - seen), "the list names it")
    return _table(columns)


def class_in_words(name: str) -> str:
    """`ApplyEyeMakeup` -> `apply eye makeup`, `YoYo` -> `yo yo`, `TaiChi` -> `tai chi`."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


def load_inter4k(request: Request, findings: Findings) -> pa.Table:
    """`60fps/UHD/17.mp4`; lists of names choose some.

    Columns: `file`, `variant` (`60fps/UHD`), `number`.
    """
    files = _files_in(folder_of(request))
    wanted = {
        Path(line.split()[0]).stem
        for path in request.sources
        if not path.is_dir()
        for line in _lines(path)
    }
    columns: dict[str, list[str]] = {name: [] for name in ("file", "variant", "number")}
    for file in files:
        stem = Path(file).stem
        if wanted and stem not in wanted:
            continue
        columns["file"].append(file)
        columns["variant"].append("/".join(Path(file).parts[:-1][-2:]))
        columns["number"].append(stem)
    missing = wanted - set(columns["number"])
    findings.add_all("no_file", sorted(missing), "the list names it")
    return _table(columns)


def load_mixkit(request: Request, findings: Findings) -> pa.Table:
    """A folder of categories, with or without Open-Sora-Plan's captions (`path`, `cap`).

    Columns: `path`, `cap`, `category`. Without captions, they are made of the files' names.
    """
    tables = [path for path in request.sources if not path.is_dir()]
    if tables:
        parts = [read_path_cap(path, request, findings) for path in tables]
        table = pa.concat_tables(parts, promote_options="default")
        files = as_text(table.column("path")).to_pylist()
        mixkit = [number for number, file in enumerate(files) if "mixkit" in file.lower()]
        if mixkit and len(mixkit) < len(files):  # one file has Pexels' and Pixabay's as well
            table = table.take(pa.array(mixkit))
            files = [files[number] for number in mixkit]
        return table.append_column("category", text_array([_category(file) for file in files]))
    files = _files_in(folder_of(request))
    return _table(
        {
            "path": files,
            "cap": [name_in_words(Path(file).stem) for file in files],
            "category": [_category(file) for file in files],
        }
    )


def _category(file: str) -> str:
    parts = file.replace("\\", "/").split("/")
    return parts[-2] if len(parts) > 1 else ""


def name_in_words(stem: str) -> str:
    """`mixkit-a-girl-running-on-a-beach-1234_resize1080p` -> `a girl running on a beach`."""
    stem = re.sub(r"^(mixkit|pexels|pixabay)[-_]", "", stem.lower())
    stem = re.sub(r"_resize\w*$|_scene\w*$", "", stem)
    stem = re.sub(r"[-_]\d+([-_](large|medium|small|hd|sd|\d+p?))?$", "", stem)
    return " ".join(re.split(r"[-_\s]+", stem)).strip()


def read_path_cap(path: Path, request: Request, findings: Findings) -> pa.Table:
    """A table whose `cap` may be a list of captions; the first that is not empty is taken."""
    table = read_source(path, findings, encoding=request.encoding)
    if "cap" not in table.column_names:
        return table
    captions = []
    for text in as_text(table.column("cap")).to_pylist():
        if text.startswith("["):
            try:
                values = json.loads(text)
                text = next((str(v) for v in values if v and str(v).strip()), "")
            except ValueError:
                pass  # a caption that begins with a bracket
        captions.append(text)
    return table.set_column(table.column_names.index("cap"), "cap", text_array(captions))


def load_path_cap(request: Request, findings: Findings) -> pa.Table:
    """Tables with `path` and `cap` or `text`."""
    parts = [read_path_cap(path, request, findings) for path in request.sources]
    return pa.concat_tables(parts, promote_options="default")


def load_vidprom(request: Request, findings: Findings) -> pa.Table:
    """`VidProM_unique.csv` and the videos `MODEL-UUID.mp4`: one row per video.

    Columns: those of the prompts, `file`, `model`.
    """
    tables = [path for path in request.sources if not path.is_dir()]
    if not tables:
        raise KinemaError("the prompts are missing", where="VidProM", hint="VidProM_unique.csv")
    prompts = pa.concat_tables(
        [read_source(path, findings, encoding=request.encoding) for path in tables],
        promote_options="default",
    )
    if "uuid" not in prompts.column_names:
        return prompts  # another data set's: refused by its columns
    folder = request.videos or next((s for s in request.sources if s.is_dir()), tables[0].parent)
    files = _files_in(folder)
    rows = {uuid: row for row, uuid in enumerate(as_text(prompts.column("uuid")).to_pylist())}
    taken: list[int] = []
    found: list[str] = []
    models: list[str] = []
    for file in files:
        match = re.match(rf"^([\w.]+)-({_UUID})$", Path(file).stem)
        row = rows.get(match[2]) if match else None
        if match is None or row is None:
            continue
        taken.append(row)
        found.append(file)
        models.append(match[1])
    used = set(taken)
    findings.add_all("no_file", (u for u, row in rows.items() if row not in used), "no video")
    table = prompts.take(pa.array(taken, pa.int64()))
    return table.append_column("file", text_array(found)).append_column("model", text_array(models))


def load_sidecars(folder: Path, findings: Findings) -> pa.Table:
    """Clips with `KEY.json` and `KEY.txt` beside them, as video2dataset writes them.

    Columns: `file`, `key`, the values in the JSON that are text, numbers or lists, and `caption`
    (from the text file where there is one).
    """
    rows: list[dict[str, Any]] = []
    for file in _files_in(folder):
        key = str(Path(file).with_suffix(""))
        row: dict[str, Any] = {}
        data = _small(folder / f"{key}.json", MAX_JSON_BYTES, findings)
        if data is not None:
            row |= flat_json(data, f"{key}.json", findings)
        text = _small(folder / f"{key}.txt", MAX_SIDECAR_BYTES, findings)
        if text is not None:
            row["caption"] = text.decode("utf-8-sig", errors="replace")
        rows.append(row | {"file": file, "key": row.get("key") or Path(key).name})
    return table_of(rows)


def flat_json(data: bytes, name: str, findings: Findings) -> dict[str, Any]:
    """The plain values (and lists, as JSON) of a JSON object; objects in it are left out."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        findings.add("bad_row", name, f"not JSON: {error}"[:200])
        return {}
    if not isinstance(value, dict):
        return {}
    return {
        str(key): item
        for key, item in list(value.items())[: 4 * MAX_JSON_COLUMNS]
        if item is not None and not isinstance(item, dict)
    }


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as columns: numbers where all values are, else text."""
    names = list(dict.fromkeys(name for row in rows for name in row))[:MAX_JSON_COLUMNS]
    names = list(dict.fromkeys([*names, "file", "key", "caption"]))
    return pa.table({name: plain_column([row.get(name) for row in rows]) for name in names})


def _small(path: Path, limit: int, findings: Findings) -> bytes | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        findings.add("too_large", str(path.name), f"more than {limit} bytes")
        return None
    return data


def _lines(path: Path) -> list[str]:
    if path.suffix.lower() not in (".txt", ".lst", ""):
        raise KinemaError(
            f"is not a list of names: it ends in {path.suffix!r}",
            where=str(path),
            hint="a text file, one name a line",
        )
    if not path.is_file():
        raise KinemaError("does not exist", where=str(path))
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _table(columns: dict[str, list[str]]) -> pa.Table:
    return pa.table({name: text_array(values) for name, values in columns.items()})
