"""Charts of the report as inline SVG, and numbers as people write them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from kinema.curation.report_numbers import Histogram, Numbers

WIDTH, HEIGHT = 300, 96


def text(value: object) -> str:
    """Anything as text that HTML shows as it is."""
    return html.escape(str(value), quote=True)


def count(value: float) -> str:
    """`12,345`."""
    return f"{round(value):,}"


def number(value: float) -> str:
    """A score with three digits that matter, without a needless exponent."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size and (size < 1e-4 or size >= 1e6):
        return f"{value:.2e}"
    if value == round(value) and size < 1e6:
        return f"{value:.0f}"
    digits = max(0, 2 - math.floor(math.log10(size))) if size else 0
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def hours(value: float | None) -> str:
    """Hours of video, in minutes or seconds where there is little."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:,.0f} h"
    if value >= 1:
        return f"{value:.1f} h"
    return f"{value * 60:.1f} min" if value * 60 >= 1 else f"{value * 3600:.0f} s"


def seconds(value: float) -> str:
    """Time that work took."""
    if value >= 3600:
        return f"{value / 3600:,.1f} h"
    if value >= 90:
        return f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 0.1 or value == 0 else f"{value * 1000:.0f} ms"


def share(part: float, whole: float) -> str:
    """`61 %`."""
    if not whole:
        return "–"
    percent = 100 * part / whole
    return f"{percent:.1f} %" if 0 < percent < 10 or 99 < percent < 100 else f"{percent:.0f} %"


def score_chart(found: Histogram) -> str:
    """Bars of kept clips with the dropped ones on top, and lines where rules compare."""
    top = max(int((found.kept + found.dropped).max()), 1)
    bins = len(found.kept)
    step = WIDTH / bins
    parts = []
    for k in range(bins):
        kept, dropped = int(found.kept[k]), int(found.dropped[k])
        low, high = _tall(kept, top), _tall(kept + dropped, top)
        where = f"{number(found.edges[k])} … {number(found.edges[k + 1])}"
        told = f"<title>{where}: {count(kept)} kept, {count(dropped)} dropped</title>"
        if kept:
            parts.append(_bar(k * step, HEIGHT - low, step, low, "kept", told))
        if dropped:
            parts.append(_bar(k * step, HEIGHT - high, step, high - low, "gone", told))
    span = found.edges[-1] - found.edges[0]
    for sign, value in found.thresholds:
        x = (value - found.edges[0]) / span * WIDTH
        # What a rule drops lies to the left of its line or to the right.
        shade = (0, x) if sign.startswith(">") else (x, WIDTH - x) if sign != "==" else (x, 0)
        parts.append(
            f'<rect class="shade" x="{shade[0]:.1f}" y="0" width="{max(0, shade[1]):.1f}" '
            f'height="{HEIGHT}"/><line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" '
            f'y2="{HEIGHT}"/>'
        )
    label = f"Histogram of {found.name}"
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(label)}">{"".join(parts)}</svg>'
        f'<div class="axis"><span>{number(found.edges[0])}</span>'
        f"<span>{number(found.edges[-1])}</span></div>"
    )


def plain_chart(edges: Numbers, values: Sequence[int], label: str, unit: str) -> str:
    """Bars of one kind."""
    top, step = max(max(values, default=0), 1), WIDTH / max(1, len(values))
    parts = [
        _bar(k * step, HEIGHT - _tall(int(value), top), step, _tall(int(value), top), "kept",
             f"<title>{number(edges[k])} … {number(edges[k + 1])} {unit}: {count(value)}</title>")
        for k, value in enumerate(values) if value
    ]  # fmt: skip
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(label)}">{"".join(parts)}</svg>'
        f'<div class="axis"><span>{number(edges[0])}</span><span>{number(edges[-1])} {unit}</span>'
        "</div>"
    )


def bars(items: Sequence[tuple[str, int]], whole: int) -> str:
    """Named counts as horizontal bars."""
    most = max((value for _, value in items), default=1) or 1
    lines = [
        f'<li><i style="width:{100 * value / most:.1f}%"></i><span>{text(name)}</span>'
        f"<b>{count(value)}</b><em>{share(value, whole)}</em></li>"
        for name, value in items
    ]
    return f'<ul class="bars">{"".join(lines)}</ul>'


def _tall(value: int, top: int) -> float:
    return max(1.2, value / top * (HEIGHT - 4)) if value else 0.0


def _bar(x: float, y: float, width: float, height: float, kind: str, inside: str) -> str:
    return (
        f'<rect class="{kind}" x="{x + 0.3:.1f}" y="{y:.1f}" width="{max(0.5, width - 0.6):.1f}" '
        f'height="{height:.1f}">{inside}</rect>'
    )
