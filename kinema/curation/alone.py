"""One stage alone: columns for the clips of a manifest, or cuts for raw videos.

Nothing is cut: the manifest's files are looked at where they are, and its rows stay, with further
columns. What was found is kept beside the new manifest, so that a stopped run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.config.errors import KinemaError
from kinema.curation.clips import clip_table
from kinema.curation.config import CurateRecipe
from kinema.curation.engine import BadRow, StageStats, run_stages
from kinema.curation.executor import Executor
from kinema.curation.files import seen_from_here
from kinema.curation.inputs import find_inputs
from kinema.curation.merge_rows import as_type
from kinema.curation.stage import Places, Stage
from kinema.curation.stages import (
    caption_stages,
    check_models,
    clip_stages,
    frame_stages,
    source_stages,
)
from kinema.curation.store import ResultStore
from kinema.data.manifest import Manifest
from kinema.data.table_file import check_place, whole_place
from kinema.media.stores import parent

WORK = ".curation"
"""Ending of the folder beside the new manifest."""


class Alone:
    """A run of one stage over a table.

    Attributes:
        bad: rows without a result.
        stats: what the stages did.
    """

    def __init__(self, output: str, recipe: CurateRecipe, executor: Executor) -> None:
        """
        Args:
            output: the file that will be written.
            recipe: with nothing switched on but what is wanted (`curate/alone`).
        """
        # Files are looked at as they are, and not written again in another shape.
        cut = replace(recipe.cut, mode="copy", whole="keep", letterbox="keep")
        self._recipe = replace(recipe, cut=cut)
        self._executor = executor
        self._places = Places.below(f"{whole_place(output)}{WORK}")
        self.bad: list[BadRow] = []
        self.stats: list[StageStats] = []

    def close(self) -> None:
        """End the workers."""
        self._executor.close()

    def _run(self, store: ResultStore, stages: Sequence[Stage], table: pa.Table) -> pa.Table:
        if not stages:
            return table
        report = run_stages(
            stages,
            table,
            places=self._places,
            store=store,
            executor=self._executor,
            label=" + ".join(stage.name for stage in stages),
        )
        self.bad += report.bad
        self.stats += report.stats
        return report.table

    def cuts(self, inputs: Sequence[str], output: str, *, data_root: str | None = None) -> int:
        """Find scenes in raw videos, and write them as a cut list.

        Returns:
            How many clips it has.

        Raises:
            KinemaError: no video gives a clip.
        """
        from kinema.curation.importers.cut_list import check_cut_list, write_cut_list

        check_cut_list(output)
        found = find_inputs(inputs, data_root=data_root)
        with ResultStore(f"{self._places.out}/stages") as store:
            sources = self._run(store, source_stages(self._recipe), found.table)
        rows: list[dict[str, Any]] = []
        for source in sources.select(["path", "_clips"]).to_pylist():
            clips = json.loads(source["_clips"] or "[]")
            cuts = [[c["start_s"], c["end_s"], c.get("text") or ""] for c in clips]
            if cuts:
                rows.append({"path": source["path"], "_cuts": json.dumps(cuts)})
        if not rows:
            raise KinemaError(f"none of {found.table.num_rows} videos gives a clip", where=output)
        table = pa.table({n: [row[n] for row in rows] for n in ("path", "_cuts")})
        write_cut_list(output, table, data_root=parent(whole_place(output)))
        return sum(len(json.loads(row["_cuts"])) for row in rows)

    def columns(
        self,
        manifest: str,
        output: str,
        *,
        data_root: str | None = None,
    ) -> Manifest:
        """Add the columns of the recipe's stages to a manifest, and write it.

        Rows without a result get `dropped_by` = `STAGE: REASON`; rows that were dropped before are
        not looked at.

        Raises:
            KinemaError: the manifest or a model cannot be used; every row is bad.
        """
        check_place(output)
        given = Manifest.read(manifest, data_root=data_root)
        check_models(self._recipe)
        sources = find_inputs([manifest], data_root=data_root).table
        with ResultStore(f"{self._places.out}/stages") as store:
            looked = self._run(store, source_stages(self._recipe), sources)
            clips = clip_table(looked)
            if not clips.num_rows:
                bad = self.bad[0]
                raise KinemaError(
                    f"no clip of it can be used; the first: {seen_from_here(bad.path)}: "
                    f"{bad.message}",
                    where=given.source,
                    hint="paths are below the manifest's folder, or below --data-root",
                )
            if frame_stages(self._recipe) or caption_stages(self._recipe):
                clips = self._run(store, clip_stages(self._recipe), clips)
                clips = self._run(store, caption_stages(self._recipe), clips)
        clips = self._compare(clips)
        found = self._write(given, clips, output, data_root)
        if not found.kept.any():
            raise KinemaError("no clip is left", where=output, hint="its `dropped_by` says why")
        return found

    def _compare(self, clips: pa.Table) -> pa.Table:
        if self._recipe.dedup is None:
            return clips
        from kinema.curation.dedup import dedup

        embeddings = clips.column("_embedding") if "_embedding" in clips.column_names else None
        bad = {row.id for row in self.bad}
        among = np.array([identity not in bad for identity in clips.column("id").to_pylist()])
        return dedup(clips, embeddings, self._recipe.dedup, among=among)

    def _write(
        self, given: Manifest, clips: pa.Table, output: str, data_root: str | None
    ) -> Manifest:
        names = [name for name in new_columns(self._recipe) if name in clips.column_names]
        where = {path: row for row, path in enumerate(clips.column("source").to_pylist())}
        paths = [str(given.absolute_path(row)) for row in range(len(given))]
        places = np.array([where.get(path, -1) for path in paths], np.int64)
        found = clips.select(names).take(pa.array(places, mask=places < 0))
        table = given.table
        for name in names:
            written = name.removeprefix("source_") if name in PROBED else name
            column = found.column(name)
            place = table.schema.get_field_index(written)
            if place < 0:
                table = table.append_column(written, column)
            else:  # what is not known anew stays: of rows that were dropped before, say
                before = as_type(table.column(written), column.type)
                table = table.set_column(place, written, pc.coalesce(column, before))
        of_path: dict[str, str] = {}
        for bad in self.bad:
            of_path.setdefault(bad.path, f"{bad.stage}: {bad.reason}")
        reasons = {row: of_path[path] for row, path in enumerate(paths) if path in of_path}
        manifest = Manifest(table, given.root, source=output).with_dropped(reasons)
        manifest.write(output, data_root=data_root)
        return manifest


PROBED = ("source_codec", "source_bit_rate", "source_rotation", "source_audio",
          "source_variable_rate")  # fmt: skip
"""What `probe` adds, without the prefix: the manifest's file is its own source."""


def new_columns(recipe: CurateRecipe) -> list[str]:
    """Which columns a recipe adds to a manifest; those of `probe` where it has nothing else."""
    from kinema.curation.dedup import COLUMNS as DEDUP
    from kinema.curation.look.packages import opencv

    opencv()  # before modules that need it: an error that names the package
    from kinema.curation.look import hashes, motion, quality

    names: list[str] = []
    for name, module in (("motion", motion), ("quality", quality), ("hashes", hashes)):
        if getattr(recipe, name) is not None:
            names += module.COLUMNS
    for stage in [*frame_stages(recipe), *caption_stages(recipe)]:
        names += [column for part in stage.parts for column in part.columns]
    if recipe.dedup is not None:
        names += DEDUP
    return [n for n in names if not n.startswith("_")] or [*PROBED, "duration"]
