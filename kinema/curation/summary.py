"""What a run tells its report: `run.json`."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.config.settings import to_dict
from kinema.curation.config import CurateRecipe
from kinema.curation.engine import StageStats
from kinema.curation.report import Count, RunSummary, StageSummary, Tokens
from kinema.data.manifest import Manifest

PACKAGES = ("kinema", "av", "scenedetect-headless", "opencv-python-headless", "pyarrow")
"""Whose versions are told."""


def summarise(
    recipe: CurateRecipe,
    rules: Sequence[str],
    *,
    given: int,
    inputs: Sequence[str],
    recipe_name: str,
    sources: pa.Table,
    manifest: Manifest,
    stats: Sequence[tuple[str, StageStats]],
    tokens: Sequence[Tokens],
    engine: str,
    started: datetime,
    wall_s: float,
    finished: bool,
) -> RunSummary:
    """The summary of a run.

    Args:
        given: files that were given, also those that could not be listed.
        sources: one row per video, with `_clips` (null where it could not be read), `duration`.
        stats: (`sources` or `clips`, what a stage did), in the order in which they ran.
    """
    readable = sources.filter(pc.is_valid(sources.column("_clips")))
    hours = float(pc.sum(readable.column("duration")).as_py() or 0) / 3600
    clip_hours = float(np.nansum(manifest.column("duration"))) / 3600
    stages = [
        StageSummary(
            one.name, one.computed, one.recalled, one.bad, one.worker_s, one.wall_s,
            one.video_hours, level, one.workers, one.gpu, dict(one.reasons),
        )
        for level, one in stats
    ]  # fmt: skip
    return RunSummary(
        started=started.isoformat(timespec="seconds"),
        wall_s=wall_s,
        inputs=tuple(inputs),
        recipe=to_dict(recipe),
        recipe_name=recipe_name,
        versions=_versions(),
        counts=(
            Count("files given", given),
            Count("videos readable", readable.num_rows, hours),
            Count("clips", len(manifest), clip_hours),
        ),
        rules=tuple(rules),
        stages=stages,
        tokens=tuple(tokens),
        engine=engine,
        cores=os.cpu_count(),
        machine=f"{os.cpu_count()} cores",
        finished=finished,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # OpenCV comes under several names
            continue
    return found
