"""Rules applied to a manifest on disk, a piece at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kinema.config.errors import KinemaError
from kinema.data.expression import parse, quoted
from kinema.data.filter import Filtering, FilterResult, Rule, WhatIf, parse_rules, usable
from kinema.data.table_file import TableFile, moved, whole_place, with_column, written
from kinema.data.text_on_disk import as_mask
from kinema.media.stores import parent
from kinema.telemetry.progress import Progress

DROPPED_BY = {"dropped_by": pa.large_string()}


def filter_file(
    manifest: TableFile, rules: Sequence[Rule], output: str | None, *, remove: bool = False
) -> FilterResult:
    """Apply rules, and write the manifest with `dropped_by`.

    Args:
        output: `.csv` or `.parquet`; none: only count.
        remove: write kept rows only, without `dropped_by`.

    Raises:
        KinemaError: a rule's column is not there; nothing is kept and `remove` is asked for.
    """
    filtering = Filtering(rules)
    filtering.check(manifest.schema, manifest.place)
    schema = with_column(manifest.schema, DROPPED_BY)
    if remove:
        schema = schema.remove(schema.get_field_index("dropped_by"))
    dropped = []
    columns = None if output else filtering.columns
    root = whole_place(parent(output)) if output else manifest.root
    with (
        written(output, schema) if output else nullcontext() as writer,
        Progress("filtering", total=manifest.rows, unit="row") as bar,
    ):
        for piece in manifest.pieces(columns):
            reasons = filtering.add(piece)
            dropped.append(reasons.dictionary_encode())
            if writer is not None:
                piece = moved(_with(piece, reasons), manifest.root, root)
                kept = as_mask(pc.equal(reasons, ""))
                writer.write(piece.filter(pa.array(kept)) if remove else piece)
            bar.advance(piece.num_rows)
        if remove and writer is not None and not writer.rows:
            raise KinemaError(
                "no clip is kept, so there is nothing to write",
                where=output,
                hint="loosen a rule; without --remove, dropped clips stay in the file",
            )
    return filtering.result([part.dictionary_decode() for part in dropped])


def _with(piece: pa.Table, reasons: pa.Array) -> pa.Table:
    at = piece.schema.get_field_index("dropped_by")
    if at < 0:
        return piece.append_column("dropped_by", reasons)
    return piece.set_column(at, "dropped_by", reasons)


@dataclass(frozen=True)
class WhatIfs:
    """What thresholds of one column would keep."""

    alone: WhatIf
    """Of all clips that no rule decides about (`check: ...` and the like are left out)."""
    with_rules: WhatIf | None
    """Of those that the rules which do not look at the column keep; none: there are no such."""


def what_if_file(
    manifest: TableFile,
    column: str,
    rules: Sequence[Rule] = (),
    thresholds: Sequence[float] | None = None,
) -> WhatIfs:
    """The share that each threshold of a column would keep.

    Args:
        column: its name, or any expression that is a number.

    Raises:
        ExpressionError: it is not there, or is no number.
    """
    expression = parse(quoted(column) if column in manifest.columns else column)
    others = [rule for rule in rules if not rule.columns & expression.columns]
    filtering = Filtering(others)
    filtering.check(manifest.schema, manifest.place)
    free = Filtering([])
    every: list[NDArray[np.float64]] = []
    kept: list[NDArray[np.float64]] = []
    for piece in manifest.pieces(filtering.columns | expression.columns):
        values = expression.numbers(piece)
        every.append(values[as_mask(pc.equal(free.add(piece), ""))])
        kept.append(values[as_mask(pc.equal(filtering.add(piece), ""))])
    alone = WhatIf.of(column, np.concatenate(every), thresholds)
    if not others:
        return WhatIfs(alone, None)
    return WhatIfs(alone, WhatIf.of(column, np.concatenate(kept), alone.thresholds))


def chosen_rules(
    manifest: TableFile, texts: Sequence[str], preset: Sequence[Rule], *, skip: bool
) -> tuple[list[Rule], list[tuple[Rule, list[str]]]]:
    """The rules to apply, and those that are left out with the columns that they lack.

    Args:
        skip: leave out rules whose columns are not there; otherwise they stay, and are refused.

    Raises:
        KinemaError: a rule cannot be read, or one of the preset needs a column that is not there.
    """
    rules = list({rule.text: rule for rule in (*preset, *parse_rules(texts))}.values())
    if skip:
        return usable(rules, manifest.columns)
    _, lacking = usable(preset, manifest.columns)
    if lacking:
        rule, missing = lacking[0]
        raise KinemaError(
            f"has no column {', '.join(missing)}, which the preset's rule `{rule.text}` looks at",
            where=manifest.place,
            hint="--skip-missing leaves such rules out; `kinema curate` gives the columns",
        )
    return rules, []


def render_result(result: FilterResult, *, width: int = 100) -> str:
    """What each rule dropped, as text."""
    lines = []
    if result.counts:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("rule", overflow="fold")
        for name in ("drops", "alone", "by itself", "no value"):
            table.add_column(name, justify="right", no_wrap=True)
        for count in result.counts:
            figures = (count.first, count.alone, count.would, count.no_value)
            table.add_row(_plain(count.rule.text), *(f"{n:,}" for n in figures))
        lines.append(_text(table, width))
    for reason, rows in list(result.others.items())[:8]:
        lines.append(f"dropped before, and not by a filter: {rows:,} {reason}\n")
    if len(result.others) > 8:
        lines.append(f"  and {len(result.others) - 8} more reasons\n")
    share = result.kept / max(result.rows, 1)
    lines.append(f"{result.kept:,} of {result.rows:,} clips are kept ({share:.1%})\n")
    return "".join(lines)


def render_what_if(found: WhatIfs, *, width: int = 100) -> str:
    """The table of thresholds, as text."""
    alone, within = found.alone, found.with_rules
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{alone.column}", justify="right")
    table.add_column("at least: keeps", justify="right")
    table.add_column("at most: keeps", justify="right")
    if within is not None:
        table.add_column("at least, with the rules", justify="right")
        table.add_column("at most, with the rules", justify="right")
    for i, threshold in enumerate(alone.thresholds):
        cells = [f"{threshold:.6g}", f"{alone.at_least[i]:.1%}", f"{alone.at_most[i]:.1%}"]
        if within is not None:
            share = within.rows / max(alone.rows, 1)
            cells += [f"{within.at_least[i] * share:.1%}", f"{within.at_most[i] * share:.1%}"]
        table.add_row(*cells)
    lines = [_text(table, width)]
    lines.append(f"of {alone.rows:,} clips")
    if alone.missing:
        lines.append(f"; {alone.missing:,} have no value and are kept by no threshold")
    return "".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def _text(table: Table, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
