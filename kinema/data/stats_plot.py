"""Statistics of a manifest as a picture: SVG, the same in an HTML page, or PNG.

Panels are drawn as rectangles and labels on a plain surface, which is then written as SVG or drawn
by Pillow; no plotting library is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from kinema.config.errors import KinemaError
from kinema.data.stats import NumberColumn, Stats
from kinema.data.stats_text import short
from kinema.data.writing import writing
from kinema.media.write import atomic_output

ENDINGS = (".svg", ".html", ".png")
ACROSS = 3
PANEL = (360, 220)
"""Width and height of a panel, gaps included."""
MARGIN = 28
SCALE = 2
"""Pixels of a PNG for each unit of the surface."""
INK, FAINT, BAR, GROUND = "#1f2328", "#6e7781", "#3b7dd8", "#ffffff"


@dataclass
class Surface:
    """Rectangles and labels."""

    width: int
    height: int
    boxes: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    """x, y, width, height, colour."""
    labels: list[tuple[float, float, str, int, str, str]] = field(default_factory=list)
    """x, y of the baseline, text, size, anchor (start, middle, end), colour."""

    def svg(self) -> str:
        """As a document."""
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" '
            'font-family="system-ui, sans-serif">',
            f'<rect width="100%" height="100%" fill="{GROUND}"/>',
        ]
        lines += [
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{colour}"/>'
            for x, y, w, h, colour in self.boxes
        ]
        lines += [
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{colour}">{escape(text)}</text>'
            for x, y, text, size, anchor, colour in self.labels
        ]
        return "\n".join([*lines, "</svg>"]) + "\n"

    def png(self, path: Path) -> None:
        """Drawn by Pillow."""
        from PIL import Image, ImageDraw, ImageFont

        image = Image.new("RGB", (self.width * SCALE, self.height * SCALE), GROUND)
        draw = ImageDraw.Draw(image)
        for x, y, w, h, colour in self.boxes:
            corners = (x * SCALE, y * SCALE, (x + w) * SCALE - 1, (y + h) * SCALE - 1)
            if corners[2] >= corners[0] and corners[3] >= corners[1]:
                draw.rectangle(corners, fill=colour)
        for x, y, text, size, anchor, colour in self.labels:
            font = ImageFont.load_default(size * SCALE)
            place = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
            draw.text((x * SCALE, y * SCALE), text, fill=colour, font=font, anchor=place)
        image.save(path, "PNG")


def check_plot(path: Path) -> str:
    """`.svg`, `.html` or `.png`.

    Raises:
        KinemaError: another ending.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise KinemaError(
            f"a plot's name ends in .svg, .html or .png, this one in {ending or 'nothing'!r}",
            where=str(path),
            hint=f"{path.stem or 'stats'}.svg",
        )
    return ending


def write_plot(stats: Stats, path: Path, *, title: str) -> None:
    """Write the picture; a file of that name is replaced at the end.

    Raises:
        KinemaError: another ending, or it cannot be written.
    """
    ending = check_plot(path)
    surface = draw(stats, title)
    with writing(path), atomic_output(path) as temporary:
        if ending == ".png":
            surface.png(temporary)
            return
        text = surface.svg()
        if ending == ".html":
            text = (
                f'<!doctype html>\n<html lang="en"><meta charset="utf-8">'
                f"<title>{escape(title)}</title>\n{text}</html>\n"
            )
        temporary.write_text(text, encoding="utf-8")


def draw(stats: Stats, title: str) -> Surface:
    """All panels below each other."""
    panels: list[tuple[str, list[tuple[str, float]], bool]] = []
    if stats.sizes:
        top = [(f"{w}x{h}", float(n)) for w, h, n, _ in stats.sizes[:8]]
        panels.append(("size", top, False))
        panels.append(("shape", [(name, float(n)) for name, n in stats.shapes[:8]], False))
    columns = [column for column in stats.numbers if column.known]
    if stats.captions is not None and stats.captions.words.known:
        columns.append(stats.captions.words)
    panels += [(_title(column), _bins(column), True) for column in columns]
    for labels in stats.labels:
        panels.append(
            (labels.name, [(v or "(none)", float(n)) for v, n in labels.values[:8]], False)
        )
    if stats.captions is not None and stats.captions.frequent:
        words = [(word, float(n)) for word, n in stats.captions.frequent[:8]]
        panels.append(("frequent words", words, False))
    rows = -(-len(panels) // ACROSS)
    surface = Surface(ACROSS * PANEL[0] + MARGIN, rows * PANEL[1] + 3 * MARGIN)
    hours = f"{stats.clips:,} clips, {stats.seconds / 3600:,.1f} hours"
    surface.labels.append((MARGIN, 1.4 * MARGIN, f"{title}: {hours}", 17, "start", INK))
    for number, (name, values, upright) in enumerate(panels):
        x = MARGIN + number % ACROSS * PANEL[0]
        y = 2.2 * MARGIN + number // ACROSS * PANEL[1]
        surface.labels.append((x, y + 12, name, 13, "start", INK))
        (_columns if upright else _rows)(surface, values, x, y + 22)
    return surface


def _title(column: NumberColumn) -> str:
    missing = f", {column.missing:,} missing" if column.missing else ""
    return f"{column.name} (median {short(column.quantiles[2])}{missing})"


def _bins(column: NumberColumn) -> list[tuple[str, float]]:
    edges, counts = column.histogram.edges, column.histogram.counts
    return [(short(e), float(n)) for e, n in zip(edges[:-1], counts, strict=True)]


def _columns(surface: Surface, values: list[tuple[str, float]], x: float, y: float) -> None:
    """Upright bars, with a number below every few of them."""
    wide, high = PANEL[0] - MARGIN - 8, PANEL[1] - 66
    most = max(max(n for _, n in values), 1.0)
    step = wide / len(values)
    every = -(-len(values) // 7)
    surface.boxes.append((x, y + high, wide, 1, FAINT))
    surface.labels.append((x + wide, y - 10, f"highest bar {short(most)}", 10, "end", FAINT))
    for i, (label, count) in enumerate(values):
        tall = high * count / most
        surface.boxes.append((x + i * step + 0.5, y + high - tall, max(step - 1, 0.5), tall, BAR))
        if i % every == 0:
            surface.labels.append((x + i * step, y + high + 14, label, 10, "start", FAINT))


def _rows(surface: Surface, values: list[tuple[str, float]], x: float, y: float) -> None:
    """Lying bars with their names and counts."""
    name, wide = 92, PANEL[0] - MARGIN - 8 - 92 - 52
    most = max(max(n for _, n in values), 1.0) if values else 1.0
    for i, (label, count) in enumerate(values):
        top = y + i * 19
        shown = label if len(label) <= 14 else label[:13] + "…"
        surface.labels.append((x + name - 6, top + 12, shown, 11, "end", INK))
        surface.boxes.append((x + name, top + 2, wide * count / most, 13, BAR))
        end = x + name + wide * count / most + 4
        surface.labels.append((end, top + 12, short(count), 10, "start", FAINT))
