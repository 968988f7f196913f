"""Training and validation clips, split by source video: never two clips of one video on both sides.

Which side a source is on is decided by a hash of its name alone. So the split is the same on every
machine and in every order, a source stays on its side when the data set grows, and a larger share
only moves sources from training to validation.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.data.table_file import TableFile, moved, rooted, whole_place, written
from kinema.media.stores import parent
from kinema.telemetry.progress import Progress

SOURCE = "source"


@dataclass
class Side:
    """What is on one side."""

    clips: int = 0
    seconds: float = 0.0
    """Of clips whose length is known."""
    sources: int = 0
    hashes: list[NDArray[np.uint64]] = field(default_factory=list, repr=False)


@dataclass
class Split:
    """What became of a manifest."""

    by: str
    train: Side = field(default_factory=Side)
    validation: Side = field(default_factory=Side)
    without_source: int = 0
    """Rows without a value in `by`: each is a source of its own, by its path."""


def place_of(value: str, seed: int = 0) -> int:
    """Where a source is between 0 and 2**64, the same for ever."""
    digest = hashlib.blake2b(f"kinema split {seed}\0{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def split_file(
    manifest: TableFile,
    train: str,
    validation: str,
    share: float,
    *,
    by: str = SOURCE,
    seed: int = 0,
) -> Split:
    """Write two manifests.

    Args:
        share: of sources that go into validation, 0..1; small sets come out near it only.
        by: the column that names the source of a clip.

    Raises:
        KinemaError: there is no such column, or one side has no clip.
    """
    if by not in manifest.columns:
        raise KinemaError(
            f"has no column {by!r} that says which video a clip is from",
            where=manifest.place,
            hint="--by COLUMN; --by path where every file is a video of its own",
        )
    limit = np.uint64(min(max(share, 0.0) * 2.0**64, 2.0**64 - 2048))
    result = Split(by)
    roots = [whole_place(parent(place)) for place in (train, validation)]
    with (
        written(train, manifest.schema) as kept,
        written(validation, manifest.schema) as held_out,
        Progress("splitting", total=manifest.rows, unit="row") as bar,
    ):
        for piece in manifest.pieces():
            places, missing = _places(piece, manifest.root, by, seed)
            result.without_source += missing
            out = places < limit
            for side, writer, root, mask in (
                (result.train, kept, roots[0], ~out),
                (result.validation, held_out, roots[1], out),
            ):
                rows = piece.filter(pa.array(mask))
                writer.write(moved(rows, manifest.root, root))
                side.clips += rows.num_rows
                side.seconds += _seconds(rows)
                side.hashes.append(np.unique(places[mask]))
            bar.advance(piece.num_rows)
        for side in (result.train, result.validation):
            side.sources = len(np.unique(np.concatenate(side.hashes)))
        _refuse_empty(result, manifest, share)
    return result


def _refuse_empty(result: Split, manifest: TableFile, share: float) -> None:
    sources = result.train.sources + result.validation.sources
    for name, side in (("training", result.train), ("validation", result.validation)):
        if not side.clips:
            raise KinemaError(
                f"no clip goes into {name}: {sources} sources by {result.by!r}, share {share:g}",
                where=manifest.place,
                hint="another --share, or another --seed for a small set",
            )


def _places(piece: pa.Table, root: str, by: str, seed: int) -> tuple[NDArray[np.uint64], int]:
    """Where the source of each row is, and how many rows name none."""
    column = piece.column(by)
    if by == "path":
        column = rooted(column, root)
    names = pc.fill_null(column.cast(pa.large_string()), "")
    missing = 0
    blank = pc.equal(names, "")
    if missing := int(pc.sum(blank).as_py() or 0):
        own = rooted(piece.column("path"), root) if "path" in piece.column_names else None
        if own is None:
            raise KinemaError(f"column {by!r} is empty in {missing} rows")
        names = pc.if_else(blank, own, names)
    encoded = pa.chunked_array([names.combine_chunks()]).combine_chunks().dictionary_encode()
    of_name = [place_of(name, seed) for name in encoded.dictionary.to_pylist()]
    places: NDArray[np.uint64] = np.array(of_name, np.uint64)[encoded.indices.to_numpy()]
    return places, missing


def _seconds(rows: pa.Table) -> float:
    if "num_frames" not in rows.column_names or "fps" not in rows.column_names:
        return 0.0
    seconds = pc.divide(
        rows.column("num_frames").cast(pa.float64()), rows.column("fps").cast(pa.float64())
    )
    values = seconds.to_numpy()
    return float(values[np.isfinite(values)].sum())
