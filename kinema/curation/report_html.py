"""The sections of the report as HTML; every text from outside is escaped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kinema.curation.report_charts import (
    bars,
    count,
    hours,
    number,
    plain_chart,
    score_chart,
    seconds,
    share,
    text,
)
from kinema.curation.report_numbers import Band, Histogram, Step, Words
from kinema.curation.report_style import STYLE

Figure = Callable[[int, str], str]
"""(row, what to say of it) -> a picture with words below."""
LISTED = 200
"""Refused files that are listed."""


def page(title: str, sections: Sequence[str]) -> str:
    """The document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="content-security-policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def head(title: str, lines: Sequence[str], tiles: Sequence[tuple[str, str]]) -> str:
    """Title, what ran, and the figures that matter most."""
    boxes = "".join(
        f'<div class="sheet"><b>{text(value)}</b><span>{text(name)}</span></div>'
        for value, name in tiles
    )
    told = "".join(f'<p class="soft">{text(line)}</p>' for line in lines)
    return f'<header><h1>{text(title)}</h1>{told}<div class="tiles">{boxes}</div></header>'


def section(title: str, lead: str, body: str) -> str:
    """A heading, a sentence that says how to read it, and content (HTML)."""
    return f'<section><h2>{text(title)}</h2><p class="lead">{text(lead)}</p>{body}</section>'


def funnel(steps: Sequence[Step]) -> str:
    """Bars from files to kept clips."""
    most = max((step.rows for step in steps), default=1) or 1
    lines = []
    for step in steps:
        name = f"<code>{text(step.name)}</code>" if step.rule else text(step.name)
        lost = (
            f'<i class="lost" style="width:{100 * (step.rows + step.dropped) / most:.2f}%"></i>'
            if step.dropped
            else ""
        )
        took = (
            f'<span class="bad">−{count(step.dropped)}</span>' if step.dropped else "<span></span>"
        )
        if step.rule and not step.dropped:
            took = '<span class="soft">drops none</span>'
        lines.append(
            f'<div><span class="name">{name}</span><span class="track">{lost}'
            f'<i style="width:{100 * step.rows / most:.2f}%"></i></span>'
            f"<span>{count(step.rows)}</span><span>{hours(step.hours)}</span>{took}</div>"
        )
    return f'<div class="sheet funnel">{"".join(lines)}</div>'


def histograms(found: Sequence[Histogram]) -> str:
    """Small multiples of scores."""
    key = (
        '<div class="key"><span><i class="k"></i>kept</span><span><i class="g"></i>dropped</span>'
        '<span><i class="l"></i>threshold of a rule, what it drops is shaded</span></div>'
    )
    boxes = []
    for one in found:
        low, middle, high = (number(value) for value in one.quantiles)
        limits = ", ".join(f"{sign} {number(value)}" for sign, value in one.thresholds)
        missing = f" · {count(one.missing)} without" if one.missing else ""
        boxes.append(
            f'<div class="sheet"><div class="row"><h3>{text(one.name)}</h3>'
            f'<span class="small bad">{text(limits)}</span></div>{score_chart(one)}'
            f'<p class="small">median {middle} · 5 % below {low}, 5 % above {high}{missing}</p>'
            "</div>"
        )
    return f'{key}<div class="grid">{"".join(boxes)}</div>'


def band_samples(name: str, bands: Sequence[Band], figure: Figure) -> str:
    """Random clips of each part of a score's range."""
    lines = []
    for band in bands:
        pictures = "".join(figure(row, name) for row in band.sample)
        span = (
            number(band.low)
            if band.low == band.high
            else f"{number(band.low)} … {number(band.high)}"
        )
        lines.append(
            f'<div class="band"><div><b>{span}</b><p class="small">{count(band.rows)} clips</p>'
            f'</div><div class="samples">{pictures}</div></div>'
        )
    return f'<div class="sheet" style="margin-top:12px"><h3>{text(name)}</h3>{"".join(lines)}</div>'


def captions(found: Words) -> str:
    """Lengths, words and beginnings."""
    lengths = plain_chart(found.edges, found.lengths.tolist(), "Words per caption", "words")
    whole = sum(found.lengths.tolist())
    empty = f", {count(found.empty)} kept clips have none" if found.empty else ""
    parts = [
        f'<div class="sheet"><h3>Words per caption</h3>{lengths}<p class="small">median '
        f"{number(found.median)} words · {count(found.captions)} captions{empty}</p></div>"
    ]
    if found.beginnings:
        parts.append(
            f'<div class="sheet"><h3>How captions begin</h3>{bars(found.beginnings, whole)}</div>'
        )
    common = bars(found.frequent, whole).replace('"bars"', '"bars columns"', 1)
    return (
        f'<div class="two">{"".join(parts)}</div><div class="sheet" style="margin-top:12px">'
        f"<h3>Most frequent words</h3>{common}</div>"
    )


def duplicate_groups(
    groups: Sequence[tuple[int | None, Sequence[tuple[int, str]]]], figure: Figure
) -> str:
    """Examples: the clip that is kept, and what is a duplicate of it."""
    lines = []
    for kept, members in groups:
        first = figure(kept, "") if kept is not None else '<p class="small">not in the manifest</p>'
        others = "".join(figure(row, name) for row, name in members)
        lines.append(
            f'<div class="band"><div>{first}</div><div class="samples">{others}</div></div>'
        )
    return f'<div class="sheet">{"".join(lines)}</div>'


def refused(items: Sequence[Mapping[str, Any]], counts: Sequence[tuple[str, int]]) -> str:
    """Files that gave nothing, and why."""
    lines = "".join(
        f'<tr><td class="left">{text(item.get("path", ""))}</td><td class="left"><code>'
        f"{text(item.get('reason', ''))}</code></td>"
        f'<td class="left">{text(item.get("message", ""))}</td></tr>'
        for item in items[:LISTED]
    )
    more = len(items) - LISTED
    rest = f'<p class="small">and {count(more)} more in refused.jsonl</p>' if more > 0 else ""
    return (
        f'<div class="sheet" style="margin-bottom:12px">{bars(counts, len(items))}</div>'
        '<div class="sheet wide"><table><tr><th>file</th><th class="left">reason</th>'
        f'<th class="left">what is wrong</th></tr>{lines}</table>{rest}</div>'
    )


def stages(items: Sequence[Any]) -> str:
    """Throughput and cost of each stage."""
    lines = []
    for item in items:
        kind = "GPU" if item.gpu else "core"
        rate = item.computed / item.wall_s if item.wall_s > 0 else 0
        per_hour = item.video_hours / (item.worker_s / 3600) if item.worker_s > 0 else 0
        per_row = seconds(item.worker_s / item.computed) if item.computed else "–"
        rate_shown = number(rate) if item.computed else "–"
        hours_shown = f"{number(per_hour)} h" if item.computed and item.video_hours else "–"
        took = seconds(item.wall_s) if item.computed else "–"
        work = f"{seconds(item.worker_s)} {kind}" if item.computed else "–"
        bad = f'<span class="bad">{count(item.bad)}</span>' if item.bad else "0"
        reasons = ", ".join(f"{name} {n}" for name, n in sorted(item.reasons.items()))
        under = f'<div class="small">{text(reasons)}</div>' if reasons else ""
        lines.append(
            f'<tr><td class="left">{text(item.name)}{under}</td>'
            f'<td style="text-align:left">{text(item.level)}</td>'
            f"<td>{count(item.computed)}</td><td>{count(item.recalled)}</td><td>{bad}</td>"
            f"<td>{took}</td><td>{work}</td>"
            f"<td>{rate_shown}</td><td>{per_row}</td><td>{hours_shown}</td></tr>"
        )
    names = ("stage", "rows are", "computed", "known before", "bad", "time", "work", "rows/s",
             "work per row", "video per core-hour")  # fmt: skip
    heads = "".join(
        f'<th class="left">{name}</th>' if k < 2 else f"<th>{name}</th>"
        for k, name in enumerate(names)
    )
    return f'<div class="sheet wide"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def tokens(items: Sequence[Any]) -> str:
    """What caption models used."""
    lines = []
    for item in items:
        cost = "no price given" if item.cost is None else f"{item.cost:,.2f} {item.currency}"
        lines.append(
            f'<tr><td class="left">{text(item.model)}</td><td>{count(item.requests)}</td>'
            f"<td>{count(item.failed)}</td><td>{count(item.input)}</td>"
            f"<td>{count(item.output)}</td><td>{text(cost)}</td></tr>"
        )
    return (
        '<div class="sheet wide" style="margin-top:12px"><table><tr><th class="left">captions by'
        "</th><th>requests</th><th>failed</th><th>tokens in</th><th>tokens out</th><th>cost</th>"
        f"</tr>{''.join(lines)}</table></div>"
    )


def made_by(recipe: Mapping[str, Any], versions: Mapping[str, str], inputs: Sequence[str]) -> str:
    """What it takes to do the same again."""
    settings = text(json.dumps(recipe, indent=2, ensure_ascii=False, default=str))
    lines = "".join(
        f'<tr><td class="left">{text(name)}</td>'
        f'<td class="left"><code>{text(value)}</code></td></tr>'
        for name, value in versions.items()
    )
    given = "".join(f"<li><code>{text(name)}</code></li>" for name in inputs)
    return (
        f'<div class="two"><div class="sheet"><h3>Inputs</h3><ul class="small">{given}</ul>'
        f"<h3>Versions</h3><table>{lines}</table></div>"
        f'<div class="sheet"><h3>Recipe</h3><details><summary>all settings</summary>'
        f"<pre>{settings}</pre></details></div></div>"
    )


def kept_share(kept: float, whole: float) -> str:
    """For a tile."""
    return f"kept of {count(whole)} clips ({share(kept, whole)})"
