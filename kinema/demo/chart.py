"""Line charts as inline SVG, drawn in the colours of the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 34
SMOOTHING = 0.85

Points = Sequence[tuple[float, float]]


def line_chart(points: Points, *, x_label: str, y_label: str) -> str:
    """One curve: thin as measured, strong as its running mean.

    Args:
        points: (x, y) in order of x; not-finite values are left out.
    """
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2:
        return f"<p class='quiet'>Too few points for a curve of the {escape(y_label)}.</p>"
    last, top = points[-1][0], _round_up(max(y for _, y in points))

    def place(x: float, y: float) -> str:
        right = LEFT + (WIDTH - LEFT - RIGHT) * x / last
        down = TOP + (HEIGHT - TOP - BOTTOM) * (1 - y / top)
        return f"{right:.1f},{down:.1f}"

    marks = []
    for part in range(5):
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * part / 4
        marks.append(f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y}' y2='{y}'/>")
        marks.append(f"<text x='{LEFT - 6}' y='{y + 4}' class='end'>{top * part / 4:.3g}</text>")
        x = LEFT + (WIDTH - LEFT - RIGHT) * part / 4
        marks.append(f"<text x='{x}' y='{HEIGHT - 16}' class='mid'>{last * part / 4:.0f}</text>")
    measured = " ".join(place(x, y) for x, y in points)
    smooth = " ".join(place(x, y) for x, y in running_mean(points))
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(y_label)}'>"
        + "".join(marks)
        + f"<polyline class='thin' points='{measured}'/><polyline class='curve' points='{smooth}'/>"
        + f"<text x='{middle}' y='{HEIGHT - 2}' class='mid'>{escape(x_label)}</text></svg>"
    )


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Exponential mean, freed of its start at zero."""
    result, mean, weight = [], 0.0, 0.0
    for x, y in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * y
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        result.append((x, mean / weight))
    return result


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 times a power of ten: four even steps to it read well."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 2, 4, 5, 8, 10) if unit * step >= value)
