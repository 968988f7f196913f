"""Expressions over the columns of a table: `aesthetic >= 4.5 and words(text) > 5`.

One language for filter rules, the browse page and statistics, worked out by Arrow and NumPy for a
piece of the table at a time, so that memory does not grow with the table.

Numbers are compared as they are stored (a 32-bit score of 4.7 is `>= 4.7`). What is *missing*
(null, or a number that is none) follows three rules:

- a comparison with a missing number is false, `!=` and `not in` too; so `aesthetic >= 4.5` drops
  clips without a score, and `missing(aesthetic) or aesthetic >= 4.5` keeps them;
- arithmetic with a missing number is missing, and so are x / 0 and the log or root of a number
  that has none;
- missing text is the same as empty text, as in a CSV: `duplicate_of == ""` is true for both.

`not` turns round what is false: `not aesthetic < 4.5` keeps clips without a score.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinema.data.expression_check import CONDITIONS, Checker, Kind, column_kind, nearest
from kinema.data.expression_parser import KEYWORDS, parse_tree
from kinema.data.expression_tree import (
    Call,
    Chain,
    Column,
    ExpressionError,
    Node,
    Text,
    fault,
    walk,
)
from kinema.data.expression_values import Evaluator

__all__ = ["Expression", "ExpressionError", "Kind", "column_kind", "nearest", "parse", "quoted"]

BATCH_ROWS = 1 << 16


def parse(text: str) -> Expression:
    """Read one expression.

    Raises:
        ExpressionError: it cannot be read; shows where, and what may be meant.
    """
    text = text.strip()
    tree = parse_tree(text)
    for node in walk(tree):
        if isinstance(node, Call) and node.name in ("contains", "starts", "ends", "matches"):
            _check_pattern(text, node)
    names = frozenset(node.name for node in walk(tree) if isinstance(node, Column))
    return Expression(text, names, tree)


def _check_pattern(text: str, node: Call) -> None:
    pattern = node.arguments[1]
    if not isinstance(pattern, Text):
        raise fault(text, pattern.start, pattern.end, f"{node.name} looks for a quoted text")
    if node.name == "matches":
        try:
            pc.match_substring_regex(pa.array([""]), pattern.value)
        except pa.ArrowInvalid as error:
            what = str(error).partition("regular expression: ")[2] or str(error)
            raise fault(
                text, pattern.start, pattern.end, f"not a regular expression: {what}"
            ) from None


@dataclass(frozen=True)
class Expression:
    """An expression that was read. Equal texts are equal expressions; it can be pickled."""

    text: str
    columns: frozenset[str]
    """Columns that it looks at."""
    tree: Node = field(compare=False, repr=False)

    def kind(self, schema: pa.Schema) -> Kind:
        """What its value is on tables of this schema.

        Raises:
            ExpressionError: an unknown column, a column of another kind than it is used as.
        """
        return Checker(self.text, schema).kind(self.tree)

    def check(self, schema: pa.Schema) -> None:
        """Refuse to be a condition on tables of this schema.

        Raises:
            ExpressionError: as `kind`; or it is a number or text, not a condition.
        """
        Checker(self.text, schema).want(self.tree, "flag", "a rule is true or false")

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """Where the condition holds: bool [rows].

        Raises:
            ExpressionError: as `check`.
        """
        self.check(table.schema)
        mask = np.empty(table.num_rows, np.bool_)
        for first, batch in self._batches(table):
            mask[first : first + batch.num_rows] = Evaluator(batch).condition(self.tree)
        return mask

    def numbers(self, table: pa.Table) -> NDArray[np.float64]:
        """Its values as float64 [rows]; missing ones are NaN, flags 0 and 1.

        Raises:
            ExpressionError: as `kind`, or it is text.
        """
        if self.kind(table.schema) == "text":
            raise fault(self.text, 0, len(self.text), "is text, not a number")
        values = np.empty(table.num_rows, np.float64)
        for first, batch in self._batches(table):
            part = Evaluator(batch).number(self.tree)
            values[first : first + batch.num_rows] = part
        return values

    def value(self, table: pa.Table) -> pa.ChunkedArray:
        """Its values as Arrow [rows]: float64 (missing: null), bool or large_string (never null).

        Raises:
            ExpressionError: as `kind`.
        """
        kind = self.kind(table.schema)
        if kind != "text":
            values = self.numbers(table)
            missing = np.isnan(values)
            found = pa.array(values == 1 if kind == "flag" else values, mask=missing)
            return pa.chunked_array([found])
        parts = []
        for _, batch in self._batches(table):
            texts = Evaluator(batch).text(self.tree)
            if isinstance(texts, str):
                texts = pa.repeat(pa.scalar(texts, pa.large_string()), batch.num_rows)
            parts.append(texts.cast(pa.large_string()))
        return pa.chunked_array(parts, pa.large_string())

    def looked_at(self, table: pa.Table, row: int) -> list[tuple[str, Any]]:
        """What the expression looks at in one row: columns, and what is worked out of them before
        it is compared, each as (its text, its value); a missing value is None."""
        one = table.slice(row, 1)
        found: dict[str, Any] = {}
        for node in walk(self.tree):
            calls = isinstance(node, Call) and node.name not in CONDITIONS
            if not (isinstance(node, (Column, Chain)) or calls):
                continue
            if not any(isinstance(part, Column) for part in walk(node)):
                continue
            words = self.text[node.start : node.end]
            part = Expression(words, self.columns, node)
            found[words] = part.value(one)[0].as_py()
        # Columns last: `words(text) = 3, text = ...`
        return sorted(found.items(), key=lambda item: item[0].strip("`") in self.columns)

    def _batches(self, table: pa.Table) -> Iterator[tuple[int, pa.RecordBatch]]:
        first = 0
        if not self.columns:  # a table without columns has no batches
            for first in range(0, table.num_rows, BATCH_ROWS):
                rows = min(BATCH_ROWS, table.num_rows - first)
                yield first, pa.record_batch([pa.nulls(rows)], names=["_"])
            return
        for batch in table.select(sorted(self.columns)).to_batches(BATCH_ROWS):
            yield first, batch
            first += batch.num_rows


def quoted(name: str) -> str:
    """A column's name as an expression.

    Raises:
        ExpressionError: the name has a backtick, which no expression can spell.
    """
    if "`" in name:
        raise ExpressionError(f"column {name!r} cannot be named in an expression")
    return name if name.isidentifier() and name not in KEYWORDS else f"`{name}`"
