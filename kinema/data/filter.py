"""Which clips are kept: rules over columns, what each of them drops, and what another threshold
would keep.

A *rule* is an expression that kept clips fulfil. A row that breaks one gets `dropped_by` =
`filter: RULE` with the first rule that it breaks. What something else wrote there (`check: ...`,
`no_caption`, `not cut: ...`, `ocr: ...`) stays, and such rows count in no figure; what a filter
wrote is worked out anew, so that loosening a rule brings its rows back.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinema.data.expression import Expression, ExpressionError, column_kind, parse, quoted
from kinema.data.text_on_disk import as_mask

PREFIX = "filter: "
"""How `dropped_by` begins when a rule dropped the row."""
READY_RULES = {
    "not blank(text)": "has a caption",
    "words(text) >= 5": "the caption is no mere label",
    "file_size <= 50MB": "no file so large that reading it stalls a step",
    "2s <= duration <= 16s": "neither a flash nor a film",
    "min(height, width) >= 480": "at least 480p",
    "0.4 <= height / width <= 2.5": "no extreme shape",
    "fps >= 15": "motion is smooth",
    "motion_mv >= 0.00098": "something moves, by the codec's vectors",
    "static_share <= 0.5": "not a still for half of its length",
    "border_share <= 0.2": "no more black border than cropping takes away",
    "ocr_area <= 0.05": "little text on screen",
    'duplicate_of == ""': "no near copy of a clip that is kept",
    'similar_to == ""': "nor of one that looks the same to a model",
    "match >= 20": "the caption has to do with the picture",
}
"""Rules to start from: expression -> what it sees to."""
_SPACES = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)|\s+""", re.DOTALL)
"""Spaces outside of quotes: `dropped_by` has a rule on one line, however it was written."""


@dataclass(frozen=True)
class Rule:
    """An expression that kept clips fulfil."""

    expression: Expression

    @property
    def text(self) -> str:
        return self.expression.text

    @property
    def columns(self) -> frozenset[str]:
        return self.expression.columns

    @property
    def reason(self) -> str:
        """What `dropped_by` says of rows that this rule dropped."""
        return f"{PREFIX}{self.text}"

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read one rule.

        Raises:
            ExpressionError: it cannot be read; shows where.
        """
        return cls(parse(_SPACES.sub(lambda match: match.group(1) or " ", text)))


def parse_rules(texts: Sequence[str]) -> list[Rule]:
    """Read rules; one that is there twice counts once.

    Raises:
        ExpressionError: one cannot be read; shows where.
    """
    return list({rule.text: rule for rule in map(Rule.parse, texts)}.values())


def usable(
    rules: Sequence[Rule], columns: Collection[str]
) -> tuple[list[Rule], list[tuple[Rule, list[str]]]]:
    """Rules whose columns are there; and the others, with the columns that are not."""
    able, left_out = [], []
    for rule in rules:
        missing = sorted(rule.columns - set(columns))
        if missing:
            left_out.append((rule, missing))
        else:
            able.append(rule)
    return able, left_out


@dataclass
class RuleCount:
    """What one rule did. Rows that were dropped by something else are in no figure."""

    rule: Rule
    first: int = 0
    """Rows that it dropped: no rule before it did."""
    alone: int = 0
    """Rows that only this rule drops; without it they would be kept."""
    would: int = 0
    """Rows that it would drop if it were the only one."""
    no_value: int = 0
    """Of those, rows with a missing number in one of its columns."""


@dataclass(frozen=True)
class FilterResult:
    """What became of each row."""

    dropped_by: pa.ChunkedArray
    """large_string [rows]: why a row is not kept; empty: it is."""
    counts: list[RuleCount]
    """In the order of the rules."""
    others: dict[str, int] = field(default_factory=dict)
    """Reasons that no filter wrote -> rows, the most first."""

    @property
    def rows(self) -> int:
        return len(self.dropped_by)

    @property
    def kept(self) -> int:
        return self.rows - sum(self.others.values()) - sum(count.first for count in self.counts)

    @property
    def kept_mask(self) -> NDArray[np.bool_]:
        """Bool [rows]."""
        chunks = [as_mask(pc.equal(chunk, "")) for chunk in self.dropped_by.chunks]
        return np.concatenate(chunks or [np.zeros(0, np.bool_)])


def apply_rules(table: pa.Table, rules: Sequence[Rule]) -> FilterResult:
    """Apply rules to a table.

    Args:
        table: with the rules' columns; `dropped_by` may be there.

    Raises:
        ExpressionError: a rule's column is not there, or holds something else.
    """
    filtering = Filtering(rules)
    filtering.check(table.schema)
    return filtering.result([filtering.add(table)])


class Filtering:
    """Rules applied to a table that comes piece by piece."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = list(rules)
        self.counts = [RuleCount(rule) for rule in self.rules]
        self.others: dict[str, int] = {}
        reasons = [rule.reason for rule in self.rules]
        self._reasons = pa.array(["", *reasons], pa.large_string())

    @property
    def columns(self) -> set[str]:
        """Columns to read: the rules', and `dropped_by`."""
        return {"dropped_by"}.union(*(rule.columns for rule in self.rules))

    def check(self, schema: pa.Schema, where: str | None = None) -> None:
        """Refuse rules that do not fit.

        Raises:
            ExpressionError: a rule's column is not there, or holds something else.
        """
        for rule in self.rules:
            try:
                rule.expression.check(schema)
            except ExpressionError as error:
                raise ExpressionError(error.what, where=where, hint=error.hint) from None

    def add(self, table: pa.Table) -> pa.Array:
        """`dropped_by` of these rows (large_string, no nulls), and count them."""
        before, open_ = _dropped_before(table)
        self._count_others(before)
        first = np.zeros(table.num_rows, np.int32)
        broken = np.zeros(table.num_rows, np.int32)
        for number, (rule, count) in enumerate(zip(self.rules, self.counts, strict=True), start=1):
            breaks = ~rule.expression.mask(table) & open_
            count.would += int(breaks.sum())
            count.no_value += int((breaks & _no_value(table, rule)).sum())
            broken += breaks
            first[breaks & (first == 0)] = number
        size = len(self.rules) + 1
        firsts = np.bincount(first, minlength=size)
        alone = np.bincount(first[broken == 1], minlength=size)
        for number, count in enumerate(self.counts, start=1):
            count.first += int(firsts[number])
            count.alone += int(alone[number])
        reasons = self._reasons.take(pa.array(first))
        return reasons if before is None else pc.if_else(pa.array(open_), reasons, before)

    def _count_others(self, before: pa.Array | None) -> None:
        if before is None:
            return
        for item in pc.value_counts(before).to_pylist():
            reason = item["values"]
            if reason and not reason.startswith(PREFIX):
                self.others[reason] = self.others.get(reason, 0) + item["counts"]

    def result(self, dropped_by: Sequence[pa.Array]) -> FilterResult:
        """All that was added, in order."""
        others = dict(sorted(self.others.items(), key=lambda item: (-item[1], item[0])))
        chunks = pa.chunked_array(list(dropped_by), pa.large_string())
        return FilterResult(chunks, self.counts, others)


def _dropped_before(table: pa.Table) -> tuple[pa.Array | None, NDArray[np.bool_]]:
    """The column as it was; where nothing but a filter dropped the row."""
    if "dropped_by" not in table.column_names:
        return None, np.ones(table.num_rows, np.bool_)
    column = table.column("dropped_by").combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    before = pc.fill_null(column.cast(pa.large_string()), "")
    open_ = pc.or_(pc.equal(before, ""), pc.starts_with(before, PREFIX))
    return before, as_mask(open_)


def _no_value(table: pa.Table, rule: Rule) -> NDArray[np.bool_]:
    missing = np.zeros(table.num_rows, np.bool_)
    for name in rule.columns:
        column = table.column(name)
        floating = pa.types.is_floating(column.type)
        if floating or (column.null_count and column_kind(column.type) != "text"):
            missing |= as_mask(pc.is_null(column, nan_is_null=floating))
    return missing


@dataclass(frozen=True)
class WhatIf:
    """What thresholds of one column would keep."""

    column: str
    rows: int
    """Rows that were looked at: those that nothing else drops."""
    missing: int
    """Of those, rows without a value; no threshold keeps them."""
    thresholds: NDArray[np.float64]
    at_least: NDArray[np.float64]
    """Share of `rows` with a value >= the threshold, 0..1."""
    at_most: NDArray[np.float64]
    """Share of `rows` with a value <= the threshold, 0..1."""

    @classmethod
    def of(
        cls,
        column: str,
        values: NDArray[np.float64],
        thresholds: Sequence[float] | NDArray[np.float64] | None = None,
    ) -> WhatIf:
        """What thresholds keep of values [rows]; a missing value is NaN."""
        known = np.sort(values[~np.isnan(values)])
        steps = round_thresholds(known) if thresholds is None else np.array(thresholds, np.float64)
        rows = max(len(values), 1)
        at_least = (len(known) - np.searchsorted(known, steps, "left")) / rows
        at_most = np.searchsorted(known, steps, "right") / rows
        return cls(column, len(values), len(values) - len(known), steps, at_least, at_most)

    def sentence(self, number: int) -> str:
        """`at aesthetic >= 4.9 you keep 61 %`."""
        threshold, share = self.thresholds[number], self.at_least[number]
        return f"at {self.column} >= {threshold:g} you keep {share * 100:.0f} %"


def what_if(
    table: pa.Table,
    column: str,
    thresholds: Sequence[float] | None = None,
    *,
    within: NDArray[np.bool_] | None = None,
) -> WhatIf:
    """The share that each threshold of a column would keep.

    Args:
        column: its name, or any expression that is a number (`words(text)`).
        thresholds: ascending; default: round numbers near every tenth of the values.
        within: rows to look at [rows]; default: those that only a filter dropped or nothing.

    Raises:
        ExpressionError: it is not there, or is no number.
    """
    if within is None:
        _, within = _dropped_before(table)
    values = parse(column if column not in table.column_names else quoted(column)).numbers(table)
    return WhatIf.of(column, values[within], thresholds)


def round_thresholds(values: NDArray[np.float64], parts: int = 10) -> NDArray[np.float64]:
    """Numbers with few digits near the quantiles of sorted values.

    Args:
        values: ascending, without NaN.
    """
    if not len(values):
        return np.zeros(0)
    quantiles = np.quantile(values, np.linspace(0, 1, parts + 1))
    # As many digits as it takes to tell the middle of the values apart.
    spread = quantiles[-2] - quantiles[1] or quantiles[-1] - quantiles[0]
    if not spread or not np.isfinite(spread):
        return np.unique(quantiles)
    step = 10.0 ** np.floor(np.log10(spread / parts))
    digits = int(max(0, -np.floor(np.log10(step))))
    steps = np.round(np.round(quantiles / step) * step, digits)
    return np.unique(steps)
