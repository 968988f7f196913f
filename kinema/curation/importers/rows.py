"""From sources to rows in a known layout; a file of another data set is told so."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from kinema.config.errors import KinemaError
from kinema.curation.importers.catalog import GUESSED, load_tables, looks_like
from kinema.curation.importers.dataset import DataSet, Form, Request, Rows
from kinema.curation.importers.findings import Findings
from kinema.curation.importers.generic import guess_form
from kinema.curation.importers.source_tables import TABLES, column_names


def read_rows(data_set: DataSet, request: Request, findings: Findings) -> Rows:
    """All rows of the sources.

    Raises:
        KinemaError: a source is not there, not readable, or another data set's.
    """
    _check_sources(data_set, request)
    table = (data_set.load or load_tables)(request, findings)
    where = str(request.sources[0])
    if not table.num_rows:
        lost = ", ".join(f"{reason} {count}" for reason, count in findings.counts().items())
        raise KinemaError(
            f"has no rows of {data_set.title}" + (f" ({lost})" if lost else ""),
            where=where,
            hint=f"SOURCE is {data_set.line}",
        )
    if data_set.name in GUESSED:
        asked = request
        if "file" in table.column_names and request.path_column is None:
            asked = Request(request.sources, path_column="file", text_column=request.text_column)
        form, text, notes = guess_form(table, asked, where)
        return Rows(table, form, text, notes)
    form = _form_of(data_set, table, where)
    return Rows(table, form, _caption_column(form, table, request, where))


def _form_of(data_set: DataSet, table: pa.Table, where: str) -> Form:
    there = set(table.column_names)
    for form in data_set.forms:
        if set(form.needed) <= there:
            return form
    raise _wrong_columns(data_set, list(table.column_names), where)


def _wrong_columns(data_set: DataSet, columns: list[str], where: str) -> KinemaError:
    there = set(columns)
    signs = max(data_set.signs(), key=lambda signs: len(set(signs) & there))
    missing = ", ".join(repr(name) for name in signs if name not in there)
    others = [entry for entry in looks_like(columns) if entry is not data_set]
    hint = f"SOURCE is {data_set.line}"
    if others:
        hint = f"this looks like {others[0].title}: kinema data import {others[0].name}"
    what = f"has no column {missing}" if missing else "has other columns"
    return KinemaError(
        f"{what} (it has {', '.join(columns)}): not {data_set.title}", where=where, hint=hint
    )


def _check_sources(data_set: DataSet, request: Request) -> None:
    """Refuse folders where tables are wanted, and tables of other data sets before reading all."""
    for source in request.sources:
        if not source.exists():
            raise KinemaError(
                "does not exist", where=str(source), hint=f"SOURCE is {data_set.line}"
            )
        if source.is_dir():
            if not (data_set.folders or data_set.name == "vidprom"):
                raise KinemaError(
                    "is a folder",
                    where=str(source),
                    hint=f"SOURCE is {data_set.line}",
                )
            continue
        if data_set.name in GUESSED or source.suffix.lower() not in TABLES:
            continue
        if source.suffix.lower() != ".json" or data_set.load is None:
            columns = column_names(source, encoding=request.encoding)
            others = looks_like(columns)
            if others and data_set not in others:
                raise _wrong_columns(data_set, columns, str(source))


def _caption_column(form: Form, table: pa.Table, request: Request, where: str) -> str | None:
    asked = request.text_column
    if asked is not None:
        if asked not in table.column_names:
            raise KinemaError(
                f"has no column {asked!r} (it has {', '.join(table.column_names)})",
                where=where,
                hint="--text-column with one of these",
            )
        return asked
    return next((name for name in form.text if name in table.column_names), None)


def videos_folder(request: Request) -> Path:
    """Where videos are looked for: --videos, --extract, a source that is a folder, or the folder
    that the first source lies in."""
    if request.videos is not None:
        return request.videos
    if request.extract is not None:
        return request.extract
    folders = [source for source in request.sources if source.is_dir()]
    return folders[0] if folders else request.sources[0].parent
