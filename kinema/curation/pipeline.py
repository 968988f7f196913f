"""The whole of curation, from raw videos to a manifest: `kinema curate`.

Sources are decoded once; clips are found from what that gave, cut, looked at by models, compared
with each other, captioned, and judged last of all. Results are kept per row as they come, so that
a run that was stopped, or repeated with other rules, works out only what is missing.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pa_parquet
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.config.recipe import dump_recipe
from kinema.curation.clips import clip_table, columns_of_cuts
from kinema.curation.config import CurateRecipe
from kinema.curation.cut import with_planned_sizes
from kinema.curation.dedup import COLUMNS as DEDUP
from kinema.curation.engine import BadRow, StagesReport, StageStats, recall, run_stages
from kinema.curation.executor import Executor
from kinema.curation.files import new_file, remove_leftovers, seen_from_here
from kinema.curation.inputs import Inputs, find_inputs
from kinema.curation.merge_rows import put_back
from kinema.curation.report import RunSummary, Tokens
from kinema.curation.rules import Rules
from kinema.curation.stage import Bad, Places, Row, Stage
from kinema.curation.stages import caption_stages, check_models, clip_stages, source_stages
from kinema.curation.store import ResultStore
from kinema.curation.summary import summarise
from kinema.data.filter import PREFIX as FILTER
from kinema.data.filter import FilterResult, apply_rules
from kinema.data.manifest import Manifest
from kinema.data.tables import readable_parquet, write_table
from kinema.media.stores import is_file, is_url, open_place

MANIFEST, SOURCES, REFUSED, RECIPE = (
    "manifest.parquet", "sources.parquet", "refused.jsonl", "recipe.yaml",
)  # fmt: skip
NOT_CUT = "not cut: "
"""How `dropped_by` begins of a clip that was left out before it was written."""
NAMED = 3


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    summary: RunSummary
    sources: int
    readable: int
    clips: int
    kept: int
    hours: float
    """Of video in the kept clips."""
    verdict: FilterResult
    refused: list[dict[str, str]]
    """`path`, `reason`, `message` (and `stage`) of all that gave nothing."""
    captioned: int
    """Of the kept clips."""
    stopped: KinemaError | None = None
    """Why a stage ended before its last row: the manifest holds what was done until then."""


@dataclass
class _Run:
    """A run under way: where things are, and what is told about it at the end."""

    recipe: CurateRecipe
    rules: Rules
    places: Places
    store: ResultStore
    executor: Executor
    say: Callable[[str], None]
    stats: list[tuple[str, StageStats]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)
    stopped: KinemaError | None = None

    def stages(self, stages: Sequence[Stage], table: pa.Table, level: str) -> StagesReport:
        report = run_stages(
            stages,
            table,
            places=self.places,
            store=self.store,
            executor=self.executor,
            label=" + ".join(stage.name for stage in stages),
        )
        self.stats += [(level, stats) for stats in report.stats]
        return report


def curate(
    inputs: Sequence[str],
    out: str,
    recipe: CurateRecipe,
    *,
    executor: Executor,
    recipe_name: str = "",
    captions: str | None = None,
    data_root: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Take raw videos to a manifest of clips in `out`.

    Writes `recipe.yaml`, `sources.parquet`, `clips/`, `frames/`, `signals/`, `stages/`,
    `manifest.parquet`, `refused.jsonl` and `run.json` there.

    Args:
        inputs: see `find_inputs`.
        out: a folder, or the URL of one in a store.
        say: for lines to the person: warnings, costs.

    Raises:
        KinemaError: an input, a rule or a model is not usable, no video is readable, or no clip
            was found. What was worked out is kept.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    rules = Rules.of(recipe)
    places = Places.below(out if is_url(out) else os.path.abspath(out))
    found = find_inputs(inputs, captions=captions, data_root=data_root, out=places.out)
    of_cuts = _check_rules(rules, recipe, found)
    check_models(recipe)
    with ResultStore(f"{places.out}/stages") as store:
        _open(places, recipe, found, say)
        run = _Run(recipe, rules, places, store, executor, say)
        run.refused += [asdict(item) for item in found.refused]
        sources = _sources(run, found)
        clips = clip_table(sources)
        for name in of_cuts - set(clips.column_names):  # no clip has it after all
            clips = clips.append_column(name, pa.nulls(clips.num_rows))
        if not clips.num_rows:
            _write_refused(places, run.refused)
            raise _no_clips(sources, run.refused, out)
        clips, dropped, embeddings = _cut_and_score(run, clips)
        clips = _compare(run, clips, dropped, embeddings)
        clips, dropped = _caption(run, clips, dropped)
        verdict, manifest = _judge(run, clips, dropped)
        _write_refused(places, run.refused)
        summary = summarise(
            recipe,
            rules.texts,
            given=found.table.num_rows + len(found.refused),
            inputs=inputs,
            recipe_name=recipe_name,
            sources=sources,
            manifest=manifest,
            stats=run.stats,
            tokens=run.tokens,
            engine=executor.name,
            started=started,
            wall_s=time.monotonic() - clock,
            finished=run.stopped is None,
        )
        with new_file(f"{places.out}/run.json") as file:
            file.write_text(summary.to_json(), encoding="utf-8")
    kept = verdict.kept_mask
    hours = float(np.nansum(clips.column("duration").to_numpy()[kept])) / 3600
    readable = sources.num_rows - sources.column("_clips").null_count
    return Outcome(
        summary, sources.num_rows, readable, len(manifest), int(kept.sum()), hours, verdict,
        run.refused, int((~manifest.blank & kept).sum()), run.stopped,
    )  # fmt: skip


def _check_rules(rules: Rules, recipe: CurateRecipe, found: Inputs) -> set[str]:
    """Before hours of work: every rule is about a column that there will be.

    Returns:
        those that come with lists of cuts.
    """
    from kinema.curation.stages import column_names

    names = {*column_names(recipe), *(n for n in found.table.column_names if n[0] != "_")}
    if recipe.dedup is not None:
        with_embeddings = {"similar_to", "similarity", "concept", "concept_rank"}
        names |= {n for n in DEDUP if recipe.embed is not None or n not in with_embeddings}
    of_cuts: set[str] = set()
    if rules.columns - names and "_cuts" in found.table.column_names:
        of_cuts = columns_of_cuts(found.table.column("_cuts")) & rules.columns - names
    rules.check(names | of_cuts)
    return of_cuts


def _open(places: Places, recipe: CurateRecipe, found: Inputs, say: Callable[[str], None]) -> None:
    """Write the recipe, and tell what is different from an earlier run in this folder."""
    remove_leftovers(places.clips, places.frames, places.signals)
    with new_file(f"{places.out}/{RECIPE}") as file:
        file.write_text(dump_recipe(recipe), encoding="utf-8")
    if found.images:
        say(f"{found.images} images are left out: there is nothing to cut")
    if found.made:
        say(f"{found.made} clips that curation made before are left out")
    if found.given_twice:
        say(f"{found.given_twice} files were given twice and count once")
    before = f"{places.out}/{SOURCES}"
    if is_file(before):
        known = _ids(before)
        gone = known - set(found.table.column("id").to_pylist())
        if gone:
            say(
                f"{seen_from_here(places.out)} was made from other videos too: {len(gone)} of "
                f"{len(known)} are "
                "no longer given, so their clips are not in the new manifest (their files stay)"
            )


def _ids(table: str) -> set[str]:
    with readable_parquet(table, "delete it"), open_place(table) as file:
        found = pa_parquet.ParquetFile(file).read(["id"])
    return set(found.column("id").to_pylist()) if found.num_columns else set()


def _sources(run: _Run, found: Inputs) -> pa.Table:
    """Look at every source, and find its clips."""
    stages = source_stages(run.recipe)
    report = run.stages(stages, found.table, "sources")
    run.refused += [_refusal(bad) for bad in report.bad]
    sources = report.table
    write_table(
        sources.drop_columns([n for n in sources.column_names if n.startswith("_signals")]),
        f"{run.places.out}/{SOURCES}",
    )
    none = pc.equal(pc.fill_null(sources.column("clips"), -1), 0).to_numpy()
    for row in sources.filter(pa.array(none)).select(["path", "no_clips"]).to_pylist():
        run.refused.append(
            {"path": row["path"], "stage": "segment", "reason": "no_clips",
             "message": f"gives no clip: {row['no_clips']}"}
        )  # fmt: skip
    for path, count in _damaged(sources):
        run.say(f"{seen_from_here(path)}: {count} damaged frames are in no clip")
    return sources


def _damaged(sources: pa.Table) -> list[tuple[str, int]]:
    if "damaged" not in sources.column_names:
        return []
    some = pc.greater(pc.fill_null(sources.column("damaged"), 0), 0)
    rows = sources.filter(some).select(["path", "damaged"]).to_pylist()
    return [(row["path"], row["damaged"]) for row in rows]


def _cut_and_score(
    run: _Run, clips: pa.Table
) -> tuple[pa.Table, NDArray[np.object_], pa.ChunkedArray | None]:
    """Cut clips and look at their frames; leave out those that a rule drops already."""
    stages = clip_stages(run.recipe)
    if run.recipe.dedup is not None:  # which another run found among other clips
        clips = clips.drop_columns([name for name in DEDUP if name in clips.column_names])
    later = [*stages, *caption_stages(run.recipe)]
    dropped = np.full(clips.num_rows, "", object)
    _drop_early(run, with_planned_sizes(run.recipe.cut, clips), dropped, later)
    clips, dropped = _through(run, stages, clips, dropped)
    # A rule's verdict is the filter's to give, and to take back; a clip that does not exist is not.
    absent = pc.or_(pc.is_null(clips.column("frames")), pc.is_null(clips.column("cut_by")))
    absent = absent.to_numpy()
    for row in np.flatnonzero(dropped != ""):
        if dropped[row].startswith(FILTER):
            rule = dropped[row].removeprefix(FILTER)
            dropped[row] = f"{NOT_CUT}{rule}" if absent[row] else ""
    embeddings = None
    if "_embedding" in clips.column_names:
        embeddings = clips.column("_embedding")
        clips = clips.drop_columns(["_embedding"])
    _warn_of_copies(run, clips)
    _warn_of_places(run, clips)
    return clips, dropped, embeddings


def _through(
    run: _Run, stages: Sequence[Stage], clips: pa.Table, dropped: NDArray[np.object_]
) -> tuple[pa.Table, NDArray[np.object_]]:
    """Take the clips that are not dropped through stages."""
    dropped_before, dropped = dropped, dropped.copy()
    rows = np.flatnonzero(dropped == "")
    report = run.stages(stages, clips.take(pa.array(rows)), "clips")
    places = {identity: i for i, identity in enumerate(clips.column("id").to_pylist())}
    for bad in report.bad:
        if not (bad.passing and bad.stage == "caption"):
            dropped[places[bad.id]] = f"{bad.stage}: {bad.reason}"
        run.refused.append(_refusal(bad))
    clips = put_back(clips, report.table, rows)
    # What an earlier run with other rules found costs nothing to have.
    others = np.flatnonzero(dropped_before != "")
    known = recall(stages, clips.take(pa.array(others)), places=run.places, store=run.store).table
    return put_back(clips, known, others), dropped


def _drop_early(
    run: _Run,
    clips: pa.Table,
    dropped: NDArray[np.object_],
    later: Sequence[Stage],
) -> None:
    """Mark what a rule drops already, so that nothing expensive is done for it."""
    if not run.recipe.filter.skip_dropped:
        return
    rules = run.rules.now(clips, later)
    verdict = apply_rules(clips.append_column("dropped_by", pa.array(dropped, pa.large_string())),
                          rules)  # fmt: skip
    reasons = verdict.dropped_by.to_numpy()
    new = (reasons != "") & (dropped == "")
    dropped[new] = reasons[new]


def _compare(
    run: _Run,
    clips: pa.Table,
    dropped: NDArray[np.object_],
    embeddings: pa.ChunkedArray | None,
) -> pa.Table:
    """Find duplicates and concepts among the clips that are left."""
    if run.recipe.dedup is None:
        return clips
    from kinema.curation.dedup import dedup

    among = dropped.copy()
    _drop_early(run, clips, among, caption_stages(run.recipe))
    return dedup(clips, embeddings, run.recipe.dedup, among=among == "")


def _caption(
    run: _Run, clips: pa.Table, dropped: NDArray[np.object_]
) -> tuple[pa.Table, NDArray[np.object_]]:
    """Write captions for what is left, and say how well they fit."""
    stages = caption_stages(run.recipe)
    if not stages:
        return clips, dropped
    skipped = dropped.copy()
    _drop_early(run, clips, skipped, stages)
    config = run.recipe.caption
    if config is not None and config.endpoint is not None:
        from kinema.curation.captions.cost import estimate

        left = clips.take(pa.array(np.flatnonzero(skipped == "")))
        missing = _missing(run, stages[0], left)
        cost = estimate(_rows(missing), config, run.recipe.frames)
        if cost is not None and missing.num_rows:
            run.say(f"captions by {config.model}, about: {cost}")
    clips, after = _through(run, stages, clips, skipped)
    failed = np.array([bool(a) and not b for a, b in zip(after, skipped, strict=True)])
    dropped = np.where(failed, after, dropped)
    if config is not None:
        _count_captions(run, clips, after)
    return clips, dropped


def _missing(run: _Run, stage: Stage, table: pa.Table) -> pa.Table:
    """The rows that a stage has no result for yet."""
    from kinema.curation.stage import result_key

    (part,) = stage.parts
    names = [n for n in ("id", "state", *part.depends) if n in table.column_names]
    keys = np.array([result_key(row, part) for row in _rows(table.select(names))], dtype="S32")
    return table.filter(pa.array(run.store.known(part).find(keys) < 0))


def _rows(table: pa.Table) -> Iterator[Row]:
    """Rows as Python values, which take ten times the memory of columns: a few at once."""
    for batch in table.to_batches(max_chunksize=4096):
        yield from batch.to_pylist()


def _count_captions(run: _Run, clips: pa.Table, dropped: NDArray[np.object_]) -> None:
    from kinema.curation.captions.cost import spent
    from kinema.curation.captions.stage import shortfall

    config = run.recipe.caption
    assert config is not None
    done = clips.filter(pa.array(dropped == ""))
    columns = [n for n in ("_requests", "_tokens_in", "_tokens_out") if n in done.column_names]
    cost = spent(done.select(columns).to_pylist(), config)
    refused = [bad for bad in run.refused if bad.get("stage") == "caption"]
    if cost is not None:
        requests = int(pc.sum(done.column("_requests")).as_py() or 0)
        run.tokens.append(
            Tokens(config.model, cost.tokens_in, cost.tokens_out, requests, len(refused),
                   cost.price, cost.currency)
        )  # fmt: skip
        if cost.videos:
            run.say(f"captions used {cost}")
    worded = int(pc.sum(pc.not_equal(pc.fill_null(done.column("text"), ""), "")).as_py() or 0)
    bads = [Bad(b["reason"], b["message"], b.get("passing") == "yes") for b in refused]
    run.stopped = shortfall(worded, bads)


def _judge(
    run: _Run, clips: pa.Table, dropped: NDArray[np.object_]
) -> tuple[FilterResult, Manifest]:
    """Apply the rules to all clips, and write the manifest."""
    config = run.recipe.caption
    if config is not None and config.score_text:
        from kinema.curation.captions.answers import SCORES, with_scores

        names = [n for n in SCORES if n in clips.column_names]
        rows = _rows(clips.select(["text", *names]))
        texts = [with_scores(row["text"], row) if row["text"] else "" for row in rows]
        place = clips.schema.get_field_index("text")
        clips = clips.set_column(place, "text", pa.array(texts, pa.large_string()))
    clips = clips.drop_columns([n for n in clips.column_names if n.startswith("_")])
    clips = clips.append_column("dropped_by", pa.array(dropped, pa.large_string()))
    verdict = apply_rules(clips, run.rules.rules)
    place = clips.schema.get_field_index("dropped_by")
    clips = clips.set_column(place, "dropped_by", verdict.dropped_by)
    root = run.places.out
    manifest = Manifest(clips, root if is_url(root) else Path(root), source=f"{root}/{MANIFEST}")
    manifest.write(f"{root}/{MANIFEST}")
    return verdict, manifest


def _warn_of_copies(run: _Run, clips: pa.Table) -> None:
    if run.recipe.cut.mode != "copy" or "gop" not in clips.column_names:
        return
    from kinema.curation.copy_packets import copy_warning

    warning = copy_warning(clips.column("gop").drop_null().to_pylist())
    if warning:
        run.say(warning)


def _warn_of_places(run: _Run, clips: pa.Table) -> None:
    if not is_url(run.places.out):
        return
    kept = pc.fill_null(pc.equal(clips.column("cut_by"), "kept"), False)
    here = pc.and_(kept, pc.starts_with(clips.column("path"), "/"))
    if count := pc.sum(here).as_py():
        run.say(
            f"{count} clips are files of this machine and stay here, so others cannot read them "
            "from the store; cut.whole=encode writes them there"
        )


def _refusal(bad: BadRow) -> dict[str, str]:
    found = {"path": bad.path, "stage": bad.stage, "reason": bad.reason, "message": bad.message}
    return found | ({"passing": "yes"} if bad.passing else {})


def _write_refused(places: Places, refused: list[dict[str, str]]) -> None:
    with new_file(f"{places.out}/{REFUSED}") as file, file.open("w", encoding="utf-8") as lines:
        for item in refused:
            lines.write(json.dumps(item, ensure_ascii=False) + "\n")


def _no_clips(sources: pa.Table, refused: list[dict[str, str]], out: str) -> KinemaError:
    counts = Counter(item["reason"] for item in refused)
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    first = "".join(
        f"\n  {seen_from_here(item['path'])}: {item['message']}" for item in refused[:NAMED]
    )
    return KinemaError(
        f"none of {sources.num_rows} videos gives a clip ({reasons}){first}",
        where=out,
        hint=f"{out}/{REFUSED} has the reason for each; scenes.min_s sets the shortest clip",
    )
