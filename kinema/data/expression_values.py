"""Works out checked expressions on a batch of rows."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinema.data.expression_check import CONDITIONS, Kind, column_kind
from kinema.data.expression_tree import (
    Call,
    Chain,
    Column,
    Compare,
    Flag,
    Junction,
    Negative,
    Node,
    Not,
    Number,
    Text,
    Values,
)
from kinema.data.text_on_disk import as_mask

_COMPARE = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


class Evaluator:
    """Works out a checked tree on one batch: numbers as float arrays or floats, texts as Arrow or
    str, conditions as bool arrays or bools."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch

    def column(self, node: Column) -> pa.Array:
        values = self.batch.column(node.name)
        return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values

    def is_of(self, node: Node, kind: Kind) -> bool:
        match node:
            case Text() | Number() | Flag():
                return {Text: "text", Number: "number", Flag: "flag"}[type(node)] == kind
            case Column():
                return column_kind(self.batch.column(node.name).type) == kind
            case Values():
                return (kind == "text") == isinstance(node.values[0], str)
            case Call() if node.name == "lower":
                return kind == "text"
            case Call() if node.name in CONDITIONS:
                return kind == "flag"
            case Negative() | Chain() | Call():
                return kind == "number"
        return kind == "flag"

    def number(self, node: Node) -> Any:
        match node:
            case Number():
                return node.value
            case Column():
                return _as_float(self.column(node))
            case Negative():
                return -self.number(node.operand)
            case Chain():
                value = self.number(node.first)
                for sign, operand in node.rest:
                    value = _arithmetic(sign, value, self.number(operand))
                return value
            case Call() if node.name in _NUMERIC:
                return _NUMERIC[node.name](*map(self.number, node.arguments))
            case Call() if node.name in ("words", "length"):
                return _count(node.name, self.text(node.arguments[0]))
        return np.asarray(self.condition(node)).astype(np.float64)

    def text(self, node: Node) -> Any:
        match node:
            case Text():
                return node.value
            case Call():
                inner = self.text(node.arguments[0])
                return inner.lower() if isinstance(inner, str) else pc.utf8_lower(inner)
        assert isinstance(node, Column)
        values = self.column(node)
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            values = values.cast(pa.large_string())
        return pc.fill_null(values, "") if values.null_count else values

    def condition(self, node: Node) -> Any:
        match node:
            case Flag():
                return node.value
            case Column():
                return _as_float(self.column(node)) == 1
            case Not():
                return np.logical_not(self.condition(node.operand))
            case Junction():
                join = np.logical_and if node.sign == "and" else np.logical_or
                value = self.condition(node.operands[0])
                for operand in node.operands[1:]:
                    value = join(value, self.condition(operand))
                return value
            case Compare():
                value, left = True, node.first
                for sign, right in node.rest:
                    value = np.logical_and(value, self.compare(left, sign, right))
                    left = right
                return value
            case Call() if node.name == "missing":
                return self.missing(node.arguments[0])
        assert isinstance(node, Call)
        looked_for = node.arguments[-1]
        pattern = looked_for.value if isinstance(looked_for, Text) else ""
        subject = self.text(node.arguments[0])
        lone = isinstance(subject, str)
        found = as_mask(_LOOK[node.name](pa.array([subject]) if lone else subject, pattern))
        return bool(found[0]) if lone else found

    def compare(self, left: Node, sign: str, right: Node) -> Any:
        if self.is_of(left, "text") or self.is_of(right, "text"):
            one = self.text(left)
            if isinstance(right, Values):
                within = pa.array(right.values, pa.large_string())
                lone = isinstance(one, str)
                values = pa.array([one]) if lone else one
                among = as_mask(pc.is_in(values.cast(pa.large_string()), value_set=within))
                found = bool(among[0]) if lone else among
                return np.logical_not(found) if sign == "not in" else found
            other = self.text(right)
            if isinstance(one, str) and isinstance(other, str):
                return _COMPARE[sign](one, other)
            if isinstance(one, str):
                one, other = other, one
            if not isinstance(other, str):
                one, other = one.cast(pa.large_string()), other.cast(pa.large_string())
            same = as_mask(pc.equal(one, other))
            return ~same if sign == "!=" else same
        one = self.number(left)
        with np.errstate(over="ignore"):  # a literal beyond float32 is beyond every score
            if isinstance(right, Values):
                array = np.asarray(one)
                listed = np.isin(array, np.asarray(right.values).astype(array.dtype))
                return listed if sign == "in" else ~listed & ~np.isnan(array)
            other = self.number(right)
            value = _COMPARE[sign](one, other)
        # Only `!=` is true of NaN in floating-point arithmetic.
        return value & ~(np.isnan(one) | np.isnan(other)) if sign == "!=" else value

    def missing(self, node: Node) -> Any:
        if self.is_of(node, "text"):
            texts = self.text(node)
            return texts == "" if isinstance(texts, str) else as_mask(pc.equal(texts, ""))
        return np.isnan(self.number(node))


def _as_float(values: pa.Array) -> NDArray[Any]:
    """Float32 as it is, anything else as float64; null becomes NaN."""
    if values.type not in (pa.float32(), pa.float64()):
        narrow = pa.types.is_float16(values.type)
        values = values.cast(pa.float32() if narrow else pa.float64(), safe=False)
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array


def _arithmetic(sign: str, one: Any, other: Any) -> Any:
    with np.errstate(all="ignore"):
        if sign == "/":
            divisor = np.where(np.equal(other, 0), np.nan, other)
            value = np.divide(one, divisor.astype(_type(other)))
        else:
            value = _SIGNS[sign](one, other)
    lone = not isinstance(one, np.ndarray) and not isinstance(other, np.ndarray)
    return float(value) if lone else value


def _type(value: Any) -> Any:
    return value.dtype if isinstance(value, np.ndarray) else np.float64


_SIGNS: Mapping[str, Any] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def _real(function: Any) -> Any:
    """A function whose poles and impossible values are missing."""

    def apply(value: Any) -> Any:
        with np.errstate(all="ignore"):
            found = np.asarray(function(value))
        found = np.where(np.isinf(found) & np.isfinite(value), np.nan, found).astype(found.dtype)
        return found if isinstance(value, np.ndarray) else float(found)

    return apply


def _extreme(function: Any) -> Any:
    def apply(*values: Any) -> Any:
        found = values[0]
        for value in values[1:]:
            found = function(found, value)
        return found if isinstance(found, np.ndarray) else float(found)

    return apply


_NUMERIC: Mapping[str, Any] = {
    "abs": abs,
    "log": _real(np.log),
    "log10": _real(np.log10),
    "sqrt": _real(np.sqrt),
    "min": _extreme(np.minimum),
    "max": _extreme(np.maximum),
}


def _count(name: str, texts: Any) -> Any:
    lone = isinstance(texts, str)
    values = pa.array([texts]) if lone else texts
    if name == "length":
        counts = pc.utf8_length(values).cast(pa.float64()).to_numpy(zero_copy_only=False)
    else:
        counts = word_counts(values).astype(np.float64)
    return float(counts[0]) if lone else counts


def word_counts(texts: pa.Array) -> NDArray[np.int64]:
    """Words of each text: what stands between white space, as `str.split` sees it.

    Args:
        texts: string or large_string, without nulls.

    A regular expression would take ten times as long: words are counted where they begin, in the
    bytes of all texts at once.
    """
    wide = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return np.zeros(len(texts), np.int64)
    ends = np.frombuffer(offsets, wide)[texts.offset : texts.offset + len(texts) + 1]
    letters = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]
    if not len(letters):
        return np.zeros(len(texts), np.int64)
    space = _ASCII_SPACE[letters]
    if letters.max() >= 0x80:
        for first in _WIDE_SPACE:
            _mark(space, letters, first)
    begins = ~space
    begins[1:] &= space[:-1]
    firsts = (ends[:-1] - ends[0])[np.diff(ends) > 0]
    begins[firsts] = ~space[firsts]
    places = np.searchsorted(np.flatnonzero(begins), ends - ends[0])
    return np.diff(places)


def _mark(space: NDArray[np.bool_], letters: NDArray[np.uint8], sign: bytes) -> None:
    """Set the bytes of this character, a white space beyond ASCII."""
    places = np.flatnonzero(letters[: len(letters) - len(sign) + 1] == sign[0])
    for step, byte in enumerate(sign[1:], start=1):
        places = places[letters[places + step] == byte]
    for step in range(len(sign)):
        space[places + step] = True


_ASCII_SPACE = np.zeros(256, np.bool_)
_ASCII_SPACE[[9, 10, 11, 12, 13, 28, 29, 30, 31, 32]] = True
_WIDE_SPACE = [
    chr(sign).encode()
    for sign in (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
]


_LOOK: Mapping[str, Any] = {
    "contains": lambda values, pattern: pc.match_substring(values, pattern),
    "starts": lambda values, pattern: pc.starts_with(values, pattern),
    "ends": lambda values, pattern: pc.ends_with(values, pattern),
    "matches": lambda values, pattern: pc.match_substring_regex(values, pattern),
    "blank": lambda values, _: pc.equal(pc.utf8_trim_whitespace(values), ""),
}
