"""The stage that decodes a source once for all that looks at its frames."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kinema.curation.config import HashConfig, MotionConfig, QualityConfig, ScenesConfig
from kinema.curation.files import new_file
from kinema.curation.look.analyzer import SMALL
from kinema.curation.look.packages import opencv
from kinema.curation.stage import Bad, Found, Part, Places, Result, Row, Work, result_key
from kinema.media.errors import PASSING, MediaError
from kinema.media.stores import Place

if TYPE_CHECKING:
    from kinema.curation.look.analyzer import Analyzer, Signal
    from kinema.curation.look.probe import SourceInfo

VERSION = 1
"""Of the pass itself: how frames are found and reduced."""
ANALYZERS = {
    "scenes": ("kinema.curation.look.scenes", "SceneAnalyzer"),
    "motion": ("kinema.curation.look.motion", "MotionAnalyzer"),
    "quality": ("kinema.curation.look.quality", "QualityAnalyzer"),
    "hashes": ("kinema.curation.look.hashes", "HashAnalyzer"),
}
"""Part -> module and class of its analyzer; the module's `VERSION` is part of the result's key."""


@dataclass(frozen=True)
class LookStage:
    """`probe` and the signals of sources. A part whose settings are None does not exist."""

    scenes: ScenesConfig | None = field(default_factory=ScenesConfig)
    motion: MotionConfig | None = field(default_factory=MotionConfig)
    quality: QualityConfig | None = field(default_factory=QualityConfig)
    hashes: HashConfig | None = field(default_factory=HashConfig)
    time_limit: float = 60.0
    """Seconds for one file beside three times its length."""

    name = "look"
    batch = 1
    gpu = False
    threads = 1

    @property
    def parts(self) -> Sequence[Part]:
        opencv()
        from kinema.curation.look import probe

        parts = [Part("probe", probe.COLUMNS, {"version": probe.VERSION})]
        for name, (module, _) in ANALYZERS.items():
            settings = getattr(self, name)
            if settings is None:
                continue
            made_by = {"pass": VERSION, "small": SMALL, "version": import_module(module).VERSION}
            if name != "scenes":  # whose settings decide by the scores, later
                made_by |= asdict(settings)
            columns = _signal_columns(name)
            parts.append(Part(name, columns, made_by, file=f"_signals_{name}"))
        return parts

    def time_limit_s(self, row: Row) -> float:
        return source_limit_s(self.time_limit, row)

    def open(self, places: Places) -> Work:
        opencv()
        stage = self

        def work(rows: Sequence[Row]) -> list[Result]:
            return [look_at(stage, places, row) for row in rows]

        return work


def source_limit_s(seconds: float, row: Row) -> float:
    """The time limit of one source: more for a long one. Its length is seldom known before, its
    size is: `state` begins with it."""
    duration = row.get("duration")
    if duration is None:
        size = str(row.get("state", "")).partition(":")[0]
        # As if it had 2 Mbit/s. What has less is decoded many times faster than it plays.
        duration = (int(size) if size.isdecimal() else 0) / 2.5e5
    return seconds + 3.0 * float(duration)


def look_at(stage: LookStage, places: Places, row: Row) -> Result:
    """All parts in the row's `todo`, from one pass over the file."""
    parts = {p.name: p for p in stage.parts if p.name in row["todo"]}
    try:
        seen = watch(row["path"], _maker(stage, [name for name in parts if name != "probe"]))
    except MediaError as error:
        passing = error.reason in PASSING
        return {name: Bad(error.reason, error.what, passing) for name in parts}
    found: dict[str, Found] = {}
    for name, part in parts.items():
        if name == "probe":
            found[name] = seen.info.columns()
            continue
        columns: dict[str, Any] = {}
        signals = seen.signals[name]
        if name == "scenes":
            signals = signals | {"damaged": seen.damaged, "keys": seen.keys}
            columns["damaged"] = int(seen.damaged.sum())
        place = f"{row['id'][:2]}/{row['id']}.{name}-{result_key(row, part)[:8]}.npz"
        with new_file(f"{places.signals}/{place}") as file:
            write_signals(file, signals)
        found[name] = columns | {f"_signals_{name}": place}
    return found


@dataclass(frozen=True)
class Seen:
    """What a pass gave."""

    info: SourceInfo
    signals: dict[str, dict[str, Signal]]
    """Per analyzer."""
    damaged: Signal
    """`[N]` bool: frames that are missing or not sound (see `decode.Damage`)."""
    keys: Signal
    """Places of key frames."""


def watch(path: Place, make: Callable[[SourceInfo], Mapping[str, Analyzer]]) -> Seen:
    """Decode a file once, for analyzers; without any, its first frame only.

    Args:
        path: a file, or the URL of one.
        make: gives the analyzers by name; called again if the file has to be begun anew.

    Raises:
        MediaError: the file cannot be used.
    """
    from kinema.curation.look.decode import Damage, IndexIsWrongError, open_source, views
    from kinema.media.container import open_video

    for trust_table in (True, False):
        with open_video(path) as video:
            source = open_source(path, video, trust_table)
            analyzers = make(source.info)
            damage = Damage(np.zeros(len(source.index), np.bool_))
            try:
                for view in views(source, damage) if analyzers else ():
                    for analyzer in analyzers.values():
                        analyzer.frame(view)
            except IndexIsWrongError:
                continue
            signals = {name: analyzer.signals() for name, analyzer in analyzers.items()}
            return Seen(source.info, signals, damage.damaged, source.index.keys)
    raise AssertionError("an index of all packets is never begun anew")


def write_signals(path: Path, signals: Mapping[str, Signal]) -> None:
    """As an `.npz`; the same signals give the same bytes."""
    content = io.BytesIO()
    arrays: Any = signals
    np.savez_compressed(content, **arrays)
    path.write_bytes(content.getvalue())


def _maker(
    stage: LookStage, names: Sequence[str]
) -> Callable[[SourceInfo], Mapping[str, Analyzer]]:
    def make(info: SourceInfo) -> dict[str, Analyzer]:
        made: dict[str, Analyzer] = {}
        for name in names:
            module, kind = ANALYZERS[name]
            made[name] = getattr(import_module(module), kind)(getattr(stage, name), info)
        return made

    return make


def _signal_columns(name: str) -> dict[str, pa.DataType]:
    columns: dict[str, pa.DataType] = {f"_signals_{name}": pa.string()}
    if name == "scenes":
        columns["damaged"] = pa.int64()
    return columns
