"""Statistics of a manifest as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from textwrap import fill

from rich.console import Console
from rich.table import Table

from kinema.data.plan import counted
from kinema.data.stats import Captions, LabelColumn, NumberColumn, Stats

BLOCKS = " ▏▎▍▌▋▊▉█"
BAR = 40
"""Characters of the longest bar."""
SIZES_SHOWN = 12
VALUES_SHOWN = 12
WORDS_SHOWN = 30
FULL_WIDTH = 110
"""Characters that all figures of a column take; a narrower terminal gets fewer of them."""
HISTOGRAMS = 8
"""Columns of which the bars are shown when none is named."""


def render_stats(stats: Stats, *, title: str, all_bars: bool = False, width: int = 100) -> str:
    """Tables and bars.

    Args:
        title: what the manifest is called.
        all_bars: the bars of every column of numbers, not of the first few.
    """
    parts = [_head(stats, title)]
    if stats.sizes:
        parts.append(_sizes(stats, width))
    same = [] if all_bars else [c for c in stats.numbers if not c.missing and c.least == c.most]
    numbers = [column for column in stats.numbers if column not in same]
    if numbers:
        parts.append(_numbers(numbers, width))
    if same:
        figures = ", ".join(f"{column.name} {short(column.least)}" for column in same)
        parts.append(fill(f"the same everywhere: {figures}", min(width, 100)) + "\n")
    shown = numbers if all_bars else [c for c in numbers if c.known][:HISTOGRAMS]
    parts += [bars(column) for column in shown if column.known]
    parts += [_labels(column) for column in stats.labels]
    if stats.captions is not None:
        parts.append(_captions(stats.captions))
    return "\n".join(parts)


def _head(stats: Stats, title: str) -> str:
    images = f", {stats.images:,} of them images" if stats.images else ""
    lines = [f"{title}: {counted(stats.rows, 'clip')}"]
    if stats.clips < stats.rows:
        lines[0] += f", {stats.clips:,} looked at ({stats.clips / stats.rows:.1%})"
    lines[0] += f"{images}, {stats.seconds / 3600:,.2f} hours"
    if stats.dropped:
        total = sum(stats.dropped.values())
        lines.append(f"dropped: {total:,} ({total / stats.rows:.1%})")
        broad = max(len(f"{n:,}") for n in stats.dropped.values())
        lines += [f"  {n:>{broad},}  {reason}" for reason, n in stats.dropped.items()][:12]
        if len(stats.dropped) > 12:
            lines.append(f"  and {len(stats.dropped) - 12} more reasons")
    return "\n".join(lines) + "\n"


def _sizes(stats: Stats, width: int) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("size")
    for name in ("clips", "share", "hours"):
        table.add_column(name, justify="right")
    for wide, high, clips, seconds in stats.sizes[:SIZES_SHOWN]:
        share = clips / max(stats.clips, 1)
        table.add_row(f"{wide}x{high}", f"{clips:,}", f"{share:.1%}", f"{seconds / 3600:,.2f}")
    rest = stats.sizes[SIZES_SHOWN:]
    if rest:
        clips = sum(size[2] for size in rest)
        hours = sum(size[3] for size in rest) / 3600
        share = clips / max(stats.clips, 1)
        table.add_row(f"{len(rest)} more", f"{clips:,}", f"{share:.1%}", f"{hours:,.2f}")
    shapes = ", ".join(f"{name} {n / max(stats.clips, 1):.1%}" for name, n in stats.shapes)
    return as_text(table, width) + f"shapes: {shapes}\n"


def _numbers(columns: Sequence[NumberColumn], width: int) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("column", overflow="fold")
    heads = ("missing", "least", "5%", "25%", "median", "75%", "95%", "most", "mean")
    left_out = {"25%", "75%", "mean"} if width < FULL_WIDTH else set()
    for name in heads:
        if name not in left_out:
            table.add_column(name, justify="right", no_wrap=True)
    for column in columns:
        figures = (column.least, *column.quantiles, column.most, column.mean)
        cells = [
            short(figure)
            for name, figure in zip(heads[1:], figures, strict=True)
            if name not in left_out
        ]
        table.add_row(column.name.replace("[", r"\["), f"{column.missing:,}", *cells)
    return as_text(table, width)


def bars(column: NumberColumn) -> str:
    """One bar for each bin."""
    edges, counts = column.histogram.edges, column.histogram.counts
    labels = [short(edge) for edge in edges[:-1]]
    broad, most = max(map(len, labels)), max(int(counts.max()), 1)
    lines = [f"{column.name}, from each number up to the next"]
    for empty, group in groupby(zip(labels, counts, strict=True), key=lambda item: item[1] == 0):
        bins = list(group)
        if empty and len(bins) > 2:
            lines.append(f"  {'...':>{broad}}")
            continue
        for label, count in bins:
            lines.append(f"  {label:>{broad}}  {bar(count / most):{BAR}}  {count:,}".rstrip())
    return "\n".join(lines) + "\n"


def bar(share: float, width: int = BAR) -> str:
    """A bar of `share` (0..1) of the width, in eighths of a character."""
    eighths = math.ceil(share * width * 8) if share > 0 else 0
    whole, part = divmod(eighths, 8)
    return BLOCKS[8] * whole + (BLOCKS[part] if part else "")


def _labels(column: LabelColumn) -> str:
    shown = [(v or "(none)", n) for v, n in column.values[:VALUES_SHOWN]]
    total = max(sum(count for _, count in column.values), 1)
    broad = max((len(value[:40]) for value, _ in shown), default=0)
    most = max((count for _, count in shown), default=1)
    lines = [column.name]
    for value, count in shown:
        share = f"{count / total:6.1%}"
        lines.append(f"  {value[:40]:{broad}}  {bar(count / most):{BAR}}  {count:,} {share}")
    if len(column.values) > VALUES_SHOWN:
        lines.append(f"  and {len(column.values) - VALUES_SHOWN} more values")
    return "\n".join(lines) + "\n"


def _captions(captions: Captions) -> str:
    lines = [f"captions: {captions.words.known:,} with text, {captions.blank:,} blank"]
    if captions.words.known:
        lines.append(bars(captions.words).rstrip())
    if captions.frequent:
        words = [f"{word} {count:,}" for word, count in captions.frequent[:WORDS_SHOWN]]
        lines.append(f"frequent words, with the captions of {captions.looked_at:,} that have them:")
        line = " "
        for word in words:
            if len(line) + len(word) > 96:
                lines.append(line)
                line = " "
            line += f" {word},"
        lines.append(line.rstrip(","))
    return "\n".join(lines) + "\n"


def short(number: float) -> str:
    """Three or four digits, with a prefix for large numbers."""
    if number != number:
        return "-"
    size = abs(number)
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if prefix == "k" else limit
            return f"{number / scale:.4g}{prefix}"
    return f"{number:.4g}" if size >= 1 else f"{number:.3g}"


def as_text(table: Table, width: int) -> str:
    """A table of Rich without colours and without spaces at the ends of lines."""
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
