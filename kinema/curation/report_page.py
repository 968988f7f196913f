"""The report of a run put together: its own numbers, its manifest's, and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from kinema.curation import report_html as to_html
from kinema.curation import report_numbers as numbers
from kinema.curation.report import RunSummary
from kinema.curation.report_charts import bars, count, hours, number, seconds, text
from kinema.curation.report_numbers import ClipTable
from kinema.curation.report_pictures import Pictures
from kinema.media.stores import Place

HISTOGRAMS = 24
SAMPLED_SCORES = 6
COLUMNS = ("id", "path", "text", "frames", "frames_count", "dropped_by", "hash_distance",
           "similarity")  # fmt: skip
WORDS = 90
"""Characters of a caption below a picture."""


def make_page(
    out: str,
    summary: RunSummary,
    manifest: Place,
    refused: Sequence[Mapping[str, Any]],
    seed: int,
) -> str:
    """The HTML of the report; arguments as for `write_report`."""
    clips = ClipTable.read(manifest)
    steps = numbers.funnel(clips, summary.counts, summary.rules)
    scored = numbers.scores(clips)
    seen = set(numbers.FIRST) - numbers.NOT_SEEN
    wanted = [name for name in scored if name in seen and _varies(clips, name)]
    banded = {name: numbers.bands(clips, name, seed=seed) for name in wanted[:SAMPLED_SCORES]}
    copies = {c: numbers.groups(clips, c, seed=seed) for c in ("duplicate_of", "similar_to")}
    kept_ids = [key for _, _, groups in copies.values() for key, _ in groups]
    kept_rows = numbers.rows_of_ids(clips, kept_ids)

    shown = {row for bands in banded.values() for band in bands for row in band.sample}
    shown |= {row for _, _, groups in copies.values() for _, rows in groups for row in rows}
    shown |= set(kept_rows.values())
    order = sorted(shown)
    rows = dict(zip(order, clips.rows(order, COLUMNS), strict=True))
    pictures = Pictures(out)

    def figure(row: int, name: str) -> str:
        return _figure(rows[row], pictures, _value(clips, rows[row], row, name))

    title = out.rstrip("/").rsplit("/", 1)[-1] or out
    return to_html.page(
        f"Curation report · {title}",
        [
            to_html.head(
                f"Curation of {title}", _lines(summary, out), _tiles(clips, summary, refused)
            ),
            to_html.section(
                "Funnel",
                "What is left after each step, in rows and in hours of video. A clip that several "
                "rules would drop counts for the first of them.",
                to_html.funnel(steps),
            ),
            _scores(clips, scored, summary.rules),
            _labels(clips),
            _samples(banded, figure),
            _captions(clips, seed),
            *(_duplicates(c, copies[c], kept_rows, figure) for c in ("duplicate_of", "similar_to")),
            _refused(refused),
            _cost(summary),
            to_html.section(
                "How it was made",
                "With the same inputs, recipe and versions the result is the same.",
                to_html.made_by(summary.recipe, summary.versions, summary.inputs),
            ),
            "<footer>Written by kinema curate. Samples are random, with a fixed seed.</footer>",
        ],
    )


def _lines(summary: RunSummary, out: str) -> list[str]:
    try:
        date = datetime.fromisoformat(summary.started).strftime("%d %B %Y, %H:%M %Z")
    except ValueError:
        date = summary.started
    cores = f"{summary.cores} cores" if summary.cores else ""
    recipe = f"recipe {summary.recipe_name or 'as by default'}"
    took = f"took {seconds(summary.wall_s)}"
    facts = [date, took, summary.machine or cores, f"{summary.engine} engine", recipe]
    lines = [out, " · ".join(fact for fact in facts if fact)]
    if not summary.finished:
        lines.append("The run was interrupted: these are the numbers of what was done until then.")
    return lines


def _tiles(
    clips: ClipTable, summary: RunSummary, refused: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str]]:
    kept = clips.kept
    tiles = []
    if summary.counts:
        first = summary.counts[0]
        tiles.append((count(first.rows), first.name))
    tiles += [
        (count(int(kept.sum())), to_html.kept_share(int(kept.sum()), len(clips))),
        (hours(clips.hours(kept)), f"of video kept, of {hours(clips.hours())} in clips"),
        (count(len(refused)), "files refused"),
    ]
    costs = [item for item in summary.tokens if item.cost is not None]
    if costs:
        total = sum(item.cost or 0.0 for item in costs)
        tiles.append((f"{total:,.2f} {costs[0].currency}", "for captions in this run"))
    else:
        work = sum(stage.worker_s for stage in summary.stages)
        tiles.append((seconds(work), "of work in this run, all workers together"))
    return tiles


def _scores(clips: ClipTable, scored: Sequence[str], rules: Sequence[str]) -> str:
    if not scored:
        return ""
    ruled = [name for name in scored if numbers.thresholds(name, rules)]
    drawn = [name for name in scored if _varies(clips, name) or name in ruled]
    found = [numbers.histogram(clips, name, rules) for name in drawn[:HISTOGRAMS]]
    same = [
        f"{name} {number(float(np.nanmedian(clips.numbers[name])))}"
        for name in scored
        if name not in drawn
    ]
    note = f'<p class="small">The same everywhere: {text(", ".join(same))}.</p>' if same else ""
    return to_html.section(
        "Scores",
        "How clips are spread over each score. Thresholds can be moved without computing anything "
        "again: kinema data filter, or the same run with other rules.",
        to_html.histograms(found) + note,
    )


def _labels(clips: ClipTable) -> str:
    boxes = []
    for name in ("camera_motion", "source_codec", "caption_model"):
        found = Counter(str(v) for v in clips.labels.get(name, ()) if v)
        if found:
            items = found.most_common(10)
            boxes.append(f'<div class="sheet"><h3>{text(name)}</h3>{bars(items, len(clips))}</div>')
    if not boxes:
        return ""
    body = f'<div class="two">{"".join(boxes)}</div>'
    return to_html.section("Labels", "Columns of words, over all clips.", body)


def _samples(banded: Mapping[str, Sequence[numbers.Band]], figure: to_html.Figure) -> str:
    if not banded:
        return ""
    body = "".join(to_html.band_samples(name, bands, figure) for name, bands in banded.items())
    return to_html.section(
        "What scores look like",
        "Random clips from five parts of each score's range, with about as many clips each; "
        "dropped ones have a frame in red.",
        body,
    )


def _captions(clips: ClipTable, seed: int) -> str:
    found = numbers.words(clips, seed=seed)
    if found is None:
        return ""
    sample = f"a sample of {count(found.sampled)} of " if found.sampled < clips.kept.sum() else ""
    return to_html.section(
        "Captions",
        f"Of {sample}the kept clips. A beginning that many captions share is mostly the captioning "
        "model's habit.",
        to_html.captions(found),
    )


def _duplicates(
    column: str,
    found: tuple[int, int, list[tuple[str, list[int]]]],
    kept_rows: Mapping[str, int],
    figure: to_html.Figure,
) -> str:
    total, kept, groups = found
    if not total:
        return ""
    exact = column == "duplicate_of"
    distance = "hash_distance" if exact else "similarity"
    examples = [(kept_rows.get(key), [(row, distance) for row in rows]) for key, rows in groups]
    return to_html.section(
        "Duplicates" if exact else "Alike in content",
        f"{'Repeats by perceptual hashes' if exact else 'Close to another by embeddings'}: "
        f"{count(total)}, in groups around {count(kept)} clips. On the left the clip that stands "
        "for its group; the largest groups first, then random ones.",
        to_html.duplicate_groups(examples, figure),
    )


def _refused(refused: Sequence[Mapping[str, Any]]) -> str:
    if not refused:
        return to_html.section("Refused files", "None: every file gave something.", "")
    counts = Counter(str(item.get("reason", "")) for item in refused).most_common()
    return to_html.section(
        "Refused files",
        f"{count(len(refused))} files gave nothing, for these reasons.",
        to_html.refused(refused, counts),
    )


def _cost(summary: RunSummary) -> str:
    if not summary.stages:
        return ""
    body = to_html.stages(summary.stages)
    if summary.tokens:
        body += to_html.tokens(summary.tokens)
    return to_html.section(
        "Throughput and cost",
        "Of this run; what earlier runs had found was not computed again. Work is the time of all "
        "workers added up.",
        body,
    )


def _varies(clips: ClipTable, name: str) -> bool:
    values = clips.numbers[name]
    known = values[np.isfinite(values)]
    return bool(known.size) and float(known.min()) < float(known.max())


def _value(clips: ClipTable, values: Mapping[str, Any], row: int, name: str) -> str:
    if not name:
        return ""
    value = values.get(name)
    if value is None and name in clips.numbers:
        value = float(clips.numbers[name][row])
    return number(float(value)) if value is not None else ""


def _figure(row: Mapping[str, Any], pictures: Pictures, value: str) -> str:
    picture = pictures.of(row)
    name = str(row.get("path") or "").rsplit("/", 1)[-1]
    caption = " ".join(str(row.get("text") or name).split())
    dropped = str(row.get("dropped_by") or "")
    shown = f'<img src="{picture}" alt="">' if picture else "no picture"
    told = f"{text(name)}{f' · dropped by {text(dropped)}' if dropped else ''}"
    words = caption if len(caption) <= WORDS else f"{caption[: WORDS - 1]}…"
    score = f"<b>{text(value)}</b> " if value else ""
    return (
        f'<figure class="{"out" if dropped else ""}" title="{told}"><div class="film">{shown}</div>'
        f"<figcaption>{score}{text(words)}</figcaption></figure>"
    )
