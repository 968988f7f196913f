"""WebDataset tars and Parquet files with videos in them: extracted once, safely, resumably.

Training and curation read files. An archive's samples go to `EXTRACT/NAME OF THE ARCHIVE/`; what
their text and JSON said is kept beside them in `.samples.parquet`, so that an archive that has not
changed is not opened again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import re
import tarfile
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pa_parquet

from kinema.config.errors import KinemaError
from kinema.curation.importers.findings import Findings
from kinema.curation.importers.folders import MAX_JSON_BYTES, flat_json, table_of
from kinema.curation.importers.source_tables import HINT
from kinema.data.captions import MAX_SIDECAR_BYTES
from kinema.data.find_media import SUFFIXES
from kinema.data.tables import readable_parquet, write_table
from kinema.data.writing import writing
from kinema.telemetry.progress import Progress

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SAMPLES = ".samples.parquet"
BLOCK = 4 << 20


def is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TARS)


def extract_tars(tars: list[Path], folder: Path, findings: Findings) -> pa.Table:
    """Extract WebDataset shards below `folder`.

    A member's name up to its first dot is the sample's key; members of one key are one sample:
    a video or image, a caption (`.txt`), facts (`.json`). Links, devices, absolute paths and paths
    with `..` are refused; other members are passed over.

    Returns:
        One row per sample with a video: `file` (below `folder`), `key`, `caption`, the JSON's
        plain values.

    Raises:
        KinemaError: no tar has a video; two tars of one name; the disk is full.
    """
    names = [_shard_name(tar) for tar in tars]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise KinemaError(
                f"two archives are called {name!r}", where=str(tars[number]), hint="rename one"
            )
    tables = []
    with Progress("extracting", total=len(tars), unit="archive") as bar:
        for tar, name in zip(tars, names, strict=True):
            tables.append(_extract(tar, folder, name, findings))
            bar.advance(note=tar.name)
    table = pa.concat_tables(tables, promote_options="permissive")
    if not table.num_rows:
        raise KinemaError("has no sample with a video", where=str(tars[0]))
    return table


def _shard_name(tar: Path) -> str:
    name = tar.name
    for suffix in sorted(TARS, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _stamp(path: Path) -> dict[bytes, bytes]:
    status = path.stat()
    return {b"archive": f"{status.st_size} {status.st_mtime_ns}".encode()}


def _extract(tar: Path, folder: Path, name: str, findings: Findings) -> pa.Table:
    done = folder / name / SAMPLES
    if done.is_file():
        table = pa_parquet.read_table(done)
        kept = table.schema.metadata or {}
        if kept.get(b"archive") == _stamp(tar)[b"archive"]:
            findings.extend(Findings(json.loads(kept[b"findings"])))
            return table
    samples: dict[str, dict[str, Any]] = {}
    told = Findings()
    complete = True
    try:
        with tarfile.open(tar, "r|*") as archive:
            for member in archive:
                _take(archive, member, folder, name, samples, told)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        told.add("truncated", tar.name, f"cannot be read further: {error}"[:200])
        complete = False
    rows = [{"key": key} | sample for key, sample in samples.items() if "file" in sample]
    findings.extend(told)
    if not rows:
        return _empty()
    kept = _stamp(tar) | {b"findings": json.dumps(told.lines).encode()}
    table = table_of(rows).replace_schema_metadata(kept)
    if complete:
        write_table(table, done)
    return table


def _empty() -> pa.Table:
    return pa.table({n: pa.array([], pa.large_string()) for n in ("file", "key", "caption")})


def _take(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    folder: Path,
    name: str,
    samples: dict[str, dict[str, Any]],
    findings: Findings,
) -> None:
    if member.isdir() or posixpath.basename(member.name).startswith("."):
        return  # hidden: what a file manager keeps beside files
    path = safe_member(member.name)
    if not member.isreg() or path is None:
        kind = "leaves the folder" if path is None else "is a link or a device"
        findings.add("unsafe_member", f"{name}: {member.name}"[:300], kind)
        return
    parent, file = posixpath.split(path)
    stem, _, extension = file.partition(".")
    key = posixpath.join(parent, stem)
    suffix = f".{extension.rsplit('.', 1)[-1].lower()}"
    if suffix in SUFFIXES:
        source = archive.extractfile(member)
        assert source is not None
        target = folder / name / path
        _write(source, target, member.size)
        samples.setdefault(key, {})["file"] = f"{name}/{path}"
    elif suffix in (".txt", ".json"):
        limit = MAX_SIDECAR_BYTES if suffix == ".txt" else MAX_JSON_BYTES
        if member.size > limit:
            findings.add("too_large", f"{name}: {path}", f"more than {limit} bytes")
            return
        source = archive.extractfile(member)
        assert source is not None
        data = source.read()
        if suffix == ".txt":
            text = data.decode("utf-8-sig", errors="replace")
            samples.setdefault(key, {})["caption"] = text
        else:
            facts = flat_json(data, f"{name}: {path}", findings)
            own = {k: v for k, v in facts.items() if k not in ("file", "key")}
            samples[key] = own | samples.get(key, {})


def safe_member(name: str) -> str | None:
    """A member's path below the folder; None if it leaves it."""
    if not name or name.startswith("/") or "\x00" in name or "\\" in name:
        return None
    path = posixpath.normpath(name)
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or path == ".":
        return None
    try:
        path.encode()
    except UnicodeEncodeError:
        return None
    return path


def _write(source: IO[bytes], target: Path, size: int) -> None:
    """A file, whole or not at all; one of that size is there from an interrupted run."""
    with contextlib.suppress(FileNotFoundError):
        if target.stat().st_size == size and not target.is_symlink():
            return
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                while block := source.read(BLOCK):
                    file.write(block)
            if temporary.stat().st_size != size:
                raise EOFError(f"{target.name} is cut off")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def bytes_column(schema: pa.Schema) -> str | None:
    """The column of a Hugging Face Parquet file that holds videos: `struct<bytes, path>`."""
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return str(field.name)
        if field.name in ("video", "mp4") and _is_binary(kind):
            return str(field.name)
    return None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def extract_parquet(paths: list[Path], column: str, folder: Path, findings: Findings) -> pa.Table:
    """Write the videos of a column of bytes below `folder`; the other columns and `file` stay.

    Raises:
        KinemaError: not readable, the disk is full.
    """
    tables = []
    with Progress("extracting", unit="video") as bar:
        for path in paths:
            with readable_parquet(path, HINT), pa_parquet.ParquetFile(path) as file:
                row = 0
                for batch in file.iter_batches(batch_size=16):
                    names = []
                    for value in batch.column(column).to_pylist():
                        names.append(_write_value(value, path, row, folder, findings))
                        row += 1
                        bar.advance()
                    rest = batch.drop_columns([column])
                    table = pa.Table.from_batches([rest])
                    tables.append(table.append_column("file", pa.array(names, pa.large_string())))
    return pa.concat_tables(tables, promote_options="permissive")


def _write_value(value: Any, path: Path, row: int, folder: Path, findings: Findings) -> str:
    data, given = value, ""
    if isinstance(value, dict):
        data, given = value.get("bytes"), str(value.get("path") or "")
    if not data:
        if given:
            return given  # kept beside the table
        findings.add("no_name", f"{path.name}: row {row}", "no video in it")
        return ""
    suffix = Path(given).suffix.lower()
    stem = re.sub(r"[^\w-]+", "_", Path(given).stem)[:80]
    name = f"{row:06d}{'_' if stem else ''}{stem}{suffix if suffix in SUFFIXES else '.mp4'}"
    _write(io.BytesIO(data), folder / path.stem / name, len(data))
    return f"{path.stem}/{name}"
