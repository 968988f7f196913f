"""Reading and writing tables: CSV or Parquet, told apart by the name's ending."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from kinema.config.errors import KinemaError
from kinema.data.writing import writing
from kinema.media.stores import filesystem, is_url, store_errors, upload, version_in_store
from kinema.media.write import atomic_output

ENDINGS = (".csv", ".parquet")
MISSING = ["", "nan", "NaN", "NAN", "null", "NULL", "None", "NA", "N/A", "<NA>"]
"""How a missing number may be spelled in CSV. Text is never missing: `NA` is a caption too."""


def check_ending(path: Path) -> str:
    """`.csv` or `.parquet`.

    Raises:
        KinemaError: any other ending, or there is a folder of that name.
    """
    if path.is_dir():
        raise KinemaError(
            "is a folder, not a table",
            where=str(path),
            hint=f"name a file: {path / 'manifest.parquet'}",
        )
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise KinemaError(
            f"a table's name ends in .csv or .parquet, this one in {ending or 'nothing'!r}",
            where=str(path),
            hint=f"{path.stem or path.name}.parquet",
        )
    return ending


def read_table(
    path: Path, types: Mapping[str, pa.DataType], *, hint: str, leave: Collection[str] = ()
) -> pa.Table:
    """The table of a `.csv` or `.parquet` file.

    Args:
        types: the types that named CSV columns are read as (they need not be there); the others
            are inferred. Parquet brings its own types.
        hint: what to do when the file is not there or not readable.
        leave: columns of a Parquet file that are not read.

    Raises:
        KinemaError: no such file, a folder, no readable table, columns that are not separated by
            commas, a repeated column name.
    """
    ending = check_there(path, hint)
    table = _read_csv(path, types, hint) if ending == ".csv" else _read_parquet(path, hint, leave)
    names = table.column_names
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise KinemaError(f"column {repeated[0]!r} is there twice", where=str(path))
    return table


def check_there(path: Path, hint: str) -> str:
    """`.csv` or `.parquet`, of a file that has something in it.

    Raises:
        KinemaError: no such file, a folder, an empty file, another ending.
    """
    ending = check_ending(path)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise KinemaError(what, where=str(path), hint=hint)
    if path.stat().st_size == 0:
        raise KinemaError("is empty (0 bytes)", where=str(path), hint=hint)
    return ending


def _read_csv(path: Path, types: Mapping[str, pa.DataType], hint: str) -> pa.Table:
    def read(threads: bool) -> pa.Table:
        return pa_csv.read_csv(
            path,
            read_options=pa_csv.ReadOptions(use_threads=threads, block_size=16 << 20),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict(types), null_values=MISSING, strings_can_be_null=False
            ),
        )

    _check_separator(path)
    try:
        return read(threads=True)
    except pa.ArrowInvalid:
        try:
            return read(threads=False)  # only a serial reader can tell the line
        except pa.ArrowInvalid as error:
            reason = "".join(c if c.isprintable() else "?" for c in str(error)[:200])
            cure = "save it as UTF-8" if "UTF8" in reason else hint
            raise KinemaError(
                f"is not a readable CSV table: {reason}", where=str(path), hint=cure
            ) from None


def _check_separator(path: Path) -> None:
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline(4096)
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if sign in header and "," not in header and header.replace("\t", "").rstrip().isprintable():
            raise KinemaError(
                f"its columns are separated by {name}", where=str(path), hint="save it with commas"
            )


def _read_parquet(path: Path, hint: str, leave: Collection[str]) -> pa.Table:
    # Not `read_table`: that one takes `key=value` in the folder's name for a column.
    with readable_parquet(path, hint), pa_parquet.ParquetFile(path) as file:
        # Names are looked at as they are: a column that is there twice is found by the caller.
        names = [n for n in file.schema_arrow.names if n not in leave] if leave else None
        return file.read(names)


@contextmanager
def readable_parquet(path: Path | str, hint: str) -> Iterator[None]:
    """Name the file that is no Parquet file, or is cut off.

    Raises:
        KinemaError: it is not readable.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise KinemaError(
            f"is not a readable Parquet file: {reason}", where=str(path), hint=hint
        ) from None


def fetched(place: str | Path) -> Path:
    """The table as a file of this machine: one in a store is copied to the user's cache first, and
    again when it changes there.

    Raises:
        KinemaError: another ending, no such file, no access.
    """
    if not is_url(place):
        return Path(place)
    url = str(place)
    name = url.rsplit("/", 1)[-1]
    check_ending(Path(name))
    try:
        version = version_in_store(url)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kinema/tables"
        key = hashlib.blake2b(f"{url} {version}".encode(), digest_size=12).hexdigest()
        file = cache / key / name
        if not file.is_file():
            system, path = filesystem(url)
            with writing(file), atomic_output(file) as temporary, store_errors(url):
                system.get_file(path, str(temporary))
    except FileNotFoundError:
        raise KinemaError("does not exist", where=url) from None
    except OSError as error:
        raise KinemaError(f"cannot be read: {error.strerror or error}", where=url) from None
    return file


def write_table(table: pa.Table, path: str | Path) -> None:
    """Write a table as `.csv` or `.parquet`; a file of that name is replaced when all is written.

    Args:
        path: a path, or the URL of a store.

    Raises:
        KinemaError: any other ending; a column that CSV cannot hold; the disk is full, the folder
            cannot be written.
    """
    if is_url(path):
        url = str(path)
        with TemporaryDirectory() as folder:
            file = Path(folder) / url.rsplit("/", 1)[-1]
            write_table(table, file)
            try:
                upload(file, url)
            except OSError as error:
                raise KinemaError(
                    f"cannot be written: {error.strerror or error}", where=url
                ) from None
        return
    path = Path(path)
    ending = check_ending(path)
    with writing(path), atomic_output(path) as temporary:
        if ending == ".csv":
            try:
                pa_csv.write_csv(table, temporary)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise KinemaError(
                    f"a column has no form in CSV: {error}",
                    where=str(path),
                    hint=f"write {path.stem}.parquet",
                ) from None
        else:
            pa_parquet.write_table(table, temporary, compression="zstd")
