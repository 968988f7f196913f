"""Columns of published tables, a million values at a time: numbers, times, captions, names."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.data.tables import MISSING

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Reals = np.ndarray[Any, np.dtype[np.float64]]

_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"
_TIME = r"^(?:(?:(?P<h>\d+):)?(?P<m>\d+):)?(?P<s>\d+(?:\.\d*)?)$"
_ODD_SPACE = (
    r" *[\t\n\v\f\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}"
    r"\x{205f}\x{3000}]"
    r"[ \t\n\v\f\r\x1c-\x1f\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}"
    r"\x{205f}\x{3000}]*| {2,}"
)
"""Runs of white space that are not one plain space; plain spaces alone are passed over quickly."""
_FIELD = re.compile(r"\{(\w[\w ]*)\}")


def as_text(column: Any) -> pa.ChunkedArray:
    """Any column as large strings without nulls."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    kind = column.type
    if pa.types.is_floating(kind):
        # 7.0 names the file 7.mp4: a column of ids with a gap was read as real numbers.
        whole = pc.equal(pc.floor(column), column)
        integers = pc.cast(pc.if_else(whole, column, None), pa.int64(), safe=False)
        column = pc.if_else(
            pc.fill_null(whole, False),
            pc.cast(integers, pa.large_string()),
            pc.cast(column, pa.large_string()),
        )
    elif pa.types.is_nested(kind):
        return pa.chunked_array([pa.repeat(pa.scalar("", pa.large_string()), len(column))])
    return pc.fill_null(pc.cast(column, pa.large_string()), "")


def tidy(column: Any) -> pa.ChunkedArray:
    """Captions on one line, single spaces, none at the ends (as `kinema.data.captions.tidy`)."""
    text = pc.replace_substring_regex(as_text(column), _ODD_SPACE, " ")
    return pc.utf8_trim(text, " ")


def numbers(column: Any) -> tuple[Reals, Mask]:
    """Values [N], NaN where there is none, and where there is something that is no number [N]."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        values = pc.cast(column, pa.float64(), safe=False)
        return to_reals(values), np.zeros(len(column), bool)
    text = pc.utf8_trim_whitespace(as_text(column))
    is_number = pc.match_substring_regex(text, _NUMBER)
    values = pc.cast(pc.if_else(is_number, text, None), pa.float64())
    missing = pc.is_in(text, value_set=pa.array(MISSING, pa.large_string()))
    return to_reals(values), to_mask(pc.invert(pc.or_(is_number, missing)))


def seconds(column: Any) -> tuple[Reals, Mask]:
    """Times [N] in seconds of `12.5`, `1:02`, `0:01:20.880`; NaN and True where there is none."""
    if isinstance(column, pa.Array):
        column = pa.chunked_array([column])
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        values, _ = numbers(column)
        return values, np.isnan(values)
    text = pc.utf8_trim_whitespace(as_text(column))
    parts = pc.extract_regex(text, _TIME)
    found = to_mask(pc.is_valid(parts))
    total = np.zeros(len(text))
    for name, factor in (("h", 3600.0), ("m", 60.0), ("s", 1.0)):
        field = pc.struct_field(parts, name)
        given = pc.and_(pc.is_valid(field), pc.not_equal(field, ""))
        value = pc.cast(pc.if_else(given, field, None), pa.float64())
        total += np.nan_to_num(to_reals(value)) * factor
    return np.where(found, total, np.nan), ~found


def is_numeric(column: Any) -> bool:
    """Whether a column of text holds numbers only (and at least one)."""
    values, bad = numbers(column)
    return bool(not bad.any() and (~np.isnan(values)).any())


def fill(template: str, table: pa.Table) -> pa.ChunkedArray:
    """`{page_dir}/{videoid}` filled with the columns of `table`; empty where one is empty."""
    pieces: list[Any] = []
    blank = np.zeros(table.num_rows, bool)
    last = 0
    for match in _FIELD.finditer(template):
        if match.start() > last:
            pieces.append(template[last : match.start()])
        column = pc.utf8_trim_whitespace(as_text(table.column(match[1])))
        blank |= to_mask(pc.equal(column, ""))
        pieces.append(column)
        last = match.end()
    pieces.append(template[last:])
    return pc.if_else(pa.array(blank), pa.scalar("", pa.large_string()), join(*pieces))


def join(*pieces: Any) -> pa.ChunkedArray:
    """Texts put together, row by row; plain strings are the same in every row."""
    large = pa.large_string()
    values = [
        pa.scalar(piece, large) if isinstance(piece, str) else pc.cast(piece, large)
        for piece in pieces
    ]
    joined = pc.binary_join_element_wise(*values, pa.scalar("", large))
    return pa.chunked_array([joined]) if isinstance(joined, pa.Array) else joined


def fields(template: str) -> list[str]:
    """The columns that a template takes."""
    return _FIELD.findall(template)


def to_mask(values: Any) -> Mask:
    """A bool column as an array; null is False."""
    mask: Mask = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return mask


def to_reals(values: Any) -> Reals:
    """A float column as an array; null is NaN."""
    array: Reals = pc.fill_null(values, float("nan")).to_numpy(zero_copy_only=False)
    return array.astype(np.float64)


def text_array(values: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.large_string())])
