"""Reading what people downloaded: CSV (any separator), JSON, JSON lines, Parquet.

Unlike a manifest, a published table is taken as it comes: CSV columns are text until they are
asked for as numbers, unnamed and repeated columns get names, and a row with too few or too many
values is counted and left out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pa_parquet

from kinema.config.errors import KinemaError
from kinema.curation.importers.columns import as_text
from kinema.curation.importers.findings import Findings
from kinema.data.tables import readable_parquet

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
HINT = "give the file as it was downloaded (unzip it first)"
SEPARATORS = ",\t;|"
BOM = "\ufeff"


def ending(path: Path) -> str:
    """`.csv` of `x.csv` and of `x.csv.gz`.

    Raises:
        KinemaError: not a table, or not there.
    """
    if not path.is_file():
        what = "is a folder, not a table" if path.is_dir() else "does not exist"
        raise KinemaError(what, where=str(path), hint=HINT)
    if path.stat().st_size == 0:
        raise KinemaError("is empty (0 bytes)", where=str(path), hint="download it again")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".zip"]:
        raise KinemaError("is a zip file", where=str(path), hint=f"unzip {path.name}")
    if suffixes[-1:] and suffixes[-1] in (".gz", ".bz2", ".zst"):
        suffixes.pop()
    if not suffixes or suffixes[-1] not in TABLES:
        raise KinemaError(
            f"is no table: its name ends in {path.suffix or 'nothing'!r}, not in "
            f"{', '.join(TABLES)}",
            where=str(path),
        )
    return suffixes[-1]


def read_source(path: Path, findings: Findings, *, encoding: str = "utf-8") -> pa.Table:
    """The rows of one table. CSV columns are text.

    Raises:
        KinemaError: not there, not readable, in another encoding, JSON that is no list of rows.
    """
    kind = ending(path)
    if kind in (".csv", ".tsv"):
        return _read_csv(path, findings, encoding)
    if kind == ".parquet":
        with readable_parquet(path, HINT), pa_parquet.ParquetFile(path) as file:
            return file.read()
    if kind == ".json":
        return as_rows(read_json(path, encoding), path)
    return _read_json_lines(path, findings, encoding)


def column_names(path: Path, *, encoding: str = "utf-8") -> list[str]:
    """The columns of a table, or the keys of the first JSON object, without reading it all."""
    kind = ending(path)
    if kind == ".parquet":
        with readable_parquet(path, HINT), pa_parquet.ParquetFile(path) as file:
            return [str(name) for name in file.schema_arrow.names]
    if kind in (".csv", ".tsv"):
        return _unique(_header(path, encoding)[0])
    if kind == ".json":
        data = read_json(path, encoding)
        return first_keys(data)
    with pa.input_stream(str(path)) as stream:
        start = stream.read(8 << 20).decode(encoding, errors="replace").removeprefix(BOM)
    lines = [line for line in start.splitlines() if line.strip()]
    return first_keys(_json(lines[0], path)) if lines else []


def first_keys(data: Any) -> list[str]:
    """The keys of the first row of JSON data."""
    row = data[0] if isinstance(data, list) and data else data
    return [str(key) for key in row] if isinstance(row, dict) else []


def read_json(path: Path, encoding: str = "utf-8") -> Any:
    """The content of a JSON file.

    Raises:
        KinemaError: it is none.
    """
    with _open(path, encoding) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise KinemaError(
                f"is not readable JSON: {str(error)[:200]}", where=str(path), hint=HINT
            ) from None


def as_rows(data: Any, path: Path) -> pa.Table:
    """A table of a list of JSON objects; lists and objects in them stay Python's JSON text.

    Raises:
        KinemaError: it is something else.
    """
    if isinstance(data, dict) and all(isinstance(value, list) for value in data.values()):
        lengths = {len(value) for value in data.values()}
        if len(lengths) == 1 and data:  # columns instead of rows
            return pa.table({str(name): plain_column(values) for name, values in data.items()})
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise KinemaError(
            f"is not a list of JSON objects but {_kind(data)}", where=str(path), hint=HINT
        )
    names = list(dict.fromkeys(str(name) for row in data for name in row))
    return pa.table({name: plain_column([row.get(name) for row in data]) for name in names})


def plain_column(values: Sequence[Any]) -> pa.Array:
    """Values of JSON as a column: whole numbers, real ones, or text; the rest as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int} and all(abs(value or 0) < 2**63 for value in values):
        return pa.array(values, pa.int64())  # an id as a real number would lose its last digits
    if kinds and kinds <= {int, float}:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    return pa.array(
        [
            value
            if isinstance(value, str) or value is None
            else json.dumps(value, ensure_ascii=False)
            for value in values
        ],
        pa.large_string(),
    )


def _kind(data: Any) -> str:
    if isinstance(data, dict):
        return "an object"
    return "a list of something else" if isinstance(data, list) else "a single value"


def _open(path: Path, encoding: str) -> Any:
    """The file as text. Names the encoding when it is another one."""
    raw = pa.input_stream(str(path))  # decompresses by the ending
    data = raw.read()
    try:
        text = data.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise _wrong_encoding(path, encoding, error) from None
    return io.StringIO(text, newline="")


def _json(line: str, path: Path) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise KinemaError(
            f"is not JSON lines: {str(error)[:200]}", where=str(path), hint=HINT
        ) from None


def _wrong_encoding(path: Path, encoding: str, error: Exception) -> KinemaError:
    unknown = isinstance(error, LookupError)
    return KinemaError(
        f"there is no encoding {encoding!r}" if unknown else f"is not {encoding.upper()} text",
        where=str(path),
        hint="--encoding cp1252 (or utf-16, gb18030, ...)",
    )


def _read_json_lines(path: Path, findings: Findings, encoding: str) -> pa.Table:
    if encoding == "utf-8":
        try:
            return pa_json.read_json(
                path,
                read_options=pa_json.ReadOptions(block_size=16 << 20),
                parse_options=pa_json.ParseOptions(newlines_in_values=False),
            )
        except pa.ArrowInvalid:
            pass  # a bad line, or values of several types in a column: one by one, then
    rows = []
    with _open(path, encoding) as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                rows.append(row)
            except (ValueError, RecursionError) as error:
                findings.add("bad_row", f"{path.name}:{number + 1}", f"not JSON: {error}"[:200])
    if not rows:
        raise KinemaError("has no line that is a JSON object", where=str(path), hint=HINT)
    return as_rows(rows, path)


def _header(path: Path, encoding: str) -> tuple[list[str], str]:
    """The names in the first row, and the separator."""
    with pa.input_stream(str(path)) as stream:
        start = stream.read(1 << 20)
    if encoding == "utf-8" and b"\x00" in start:
        raise _wrong_encoding(path, encoding, ValueError())
    try:
        text = start.decode(encoding, errors="ignore" if encoding == "utf-8" else "replace")
    except LookupError as error:
        raise _wrong_encoding(path, encoding, error) from None
    text = text.removeprefix(BOM)
    first = text.splitlines()[0] if text.splitlines() else ""
    separator = max(SEPARATORS, key=first.count) if any(s in first for s in SEPARATORS) else ","
    if path.suffix.lower() == ".tsv":
        separator = "\t"
    try:
        names = next(csv.reader(text.splitlines(keepends=True), delimiter=separator), [])
    except csv.Error as error:
        raise KinemaError(f"is not a readable CSV table: {error}", where=str(path)) from None
    return [name.strip() for name in names], separator


def _unique(names: list[str]) -> list[str]:
    """Names for all columns: unnamed ones get `column_3`, repeated ones `score_2`."""
    result: list[str] = []
    for number, name in enumerate(names):
        wanted = name or f"column_{number + 1}"
        free = wanted
        count = 2
        while free in result:
            free = f"{wanted}_{count}"
            count += 1
        result.append(free)
    return result


def _read_csv(path: Path, findings: Findings, encoding: str) -> pa.Table:
    header, separator = _header(path, encoding)
    names = _unique(header)

    def bad(row: Any) -> str:
        what = f"{row.actual_columns} values in place of {row.expected_columns}"
        place = f"{path.name}:{row.number}" if row.number is not None else path.name
        findings.add("bad_row", place, f"{what}: {row.text[:80]!r}")
        return "skip"

    try:
        table = pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(
                column_names=names,
                skip_rows_after_names=1,
                block_size=16 << 20,
                encoding="utf8" if encoding == "utf-8" else encoding,
            ),
            parse_options=pa_csv.ParseOptions(
                delimiter=separator, newlines_in_values=True, invalid_row_handler=bad
            ),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.large_string()), strings_can_be_null=False
            ),
        )
    except (pa.ArrowInvalid, UnicodeError) as error:
        reason = "".join(c if c.isprintable() else "?" for c in str(error)[:200])
        if "UTF8" in reason or isinstance(error, UnicodeError):
            raise _wrong_encoding(path, encoding, error) from None
        if "straddl" in reason:
            reason = "a quote is opened that is never closed, or a row is longer than 16 MB"
        raise KinemaError(
            f"is not a readable CSV table: {reason}", where=str(path), hint=HINT
        ) from None
    if not table.num_rows:
        raise KinemaError("has no rows", where=str(path), hint="download it again")
    return pa.table({name: as_text(table.column(name)) for name in table.column_names})
