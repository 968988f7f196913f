"""Duplicates and concepts of all clips, as columns.

Nothing is dropped here: `dedup` says which clip each one duplicates, `dedup_rules` are the rules
that drop by it. The result of a clip does not depend on the order of rows, on threads, or on
columns other than those named below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kinema.config.errors import ConfigError, KinemaError
from kinema.curation.config import DedupConfig
from kinema.curation.dedup.near import Frames, equal_clips, near_pairs
from kinema.curation.dedup.semantic import Vectors, concepts, similar_pairs, vectors_of
from kinema.curation.dedup.stars import stars

COLUMNS = {
    "duplicate_of": pa.large_string(),
    "hash_distance": pa.float32(),
    "similar_to": pa.large_string(),
    "similarity": pa.float32(),
    "concept": pa.int32(),
    "concept_rank": pa.int32(),
}
"""What `dedup` adds; the last four only where there are embeddings.

`duplicate_of`, `similar_to`: the id of the kept clip, or empty. `hash_distance`: bits that a
duplicate's frames differ by on average. `similarity`: cosine to `similar_to`. `concept`: from 0,
the largest first. `concept_rank`: from 1 among the concept's clips that are no duplicates, the best
aesthetic ones first."""


def dedup(
    table: pa.Table,
    embeddings: pa.Array | pa.ChunkedArray | None,
    config: DedupConfig,
    *,
    among: NDArray[np.bool_] | None = None,
) -> pa.Table:
    """Find duplicates and concepts.

    Of clips that are alike the one with the most pixels is kept, then the longest, then the one
    with the first id.

    Args:
        table: `id`; `phash` (missing: the clip has no near duplicates); `resolution` or `height`
            and `width`, `duration` and `aesthetic` where they are there.
        embeddings: one list of floats for each row, null where there is none.
        among: bool [rows], rows that take part; others duplicate nothing, are no one's duplicate
            and have no concept.

    Returns:
        the table with `COLUMNS` in place of columns of these names.

    Raises:
        KinemaError: an id is there twice, a hash or an embedding is not readable.
    """
    order = _best_first(table)
    if among is not None:
        order = order[among[order]]
    found = hash_duplicates(table, config, order)
    columns = {"duplicate_of": found.kept, "hash_distance": found.distance}
    if embeddings is not None:
        if len(embeddings) != table.num_rows:
            raise KinemaError(f"{len(embeddings)} embeddings for {table.num_rows} clips")
        vectors, has = vectors_of(embeddings)
        order = order[has[order]]
        vectors = vectors[(np.cumsum(has) - 1)[order]]
        original = _blank(found.kept)[order]
        similar = semantic_duplicates(table, vectors[original], config, order[original])
        columns |= {"similar_to": similar.kept, "similarity": similar.distance}
        if config.concepts is not None:
            original &= _blank(similar.kept)[order]
            number, rank = concept_ranks(table, vectors, config, order, original)
            columns |= {"concept": number, "concept_rank": rank}
    table = table.drop_columns([name for name in COLUMNS if name in table.column_names])
    for name, values in columns.items():
        table = table.append_column(pa.field(name, COLUMNS[name]), values.cast(COLUMNS[name]))
    return table


def dedup_rules(config: DedupConfig, *, embeddings: bool) -> list[str]:
    """Rules that drop what `dedup` found.

    Args:
        embeddings: whether `dedup` had any.

    Raises:
        ConfigError: concepts without embeddings, or a cap without concepts.
    """
    if config.concepts is not None and not embeddings:
        raise ConfigError(
            "concepts need embeddings", where="dedup.concepts", hint="switch `embed` on"
        )
    if config.concept_cap is not None and config.concepts is None:
        raise ConfigError(
            "a cap needs concepts", where="dedup.concept_cap", hint="dedup.concepts=1000"
        )
    rules = ['duplicate_of == ""']
    if embeddings and config.similarity is not None:
        rules.append('similar_to == ""')
    if config.concept_cap is not None:
        rules.append(f"missing(concept_rank) or concept_rank <= {config.concept_cap}")
    return rules


@dataclass(frozen=True)
class Alike:
    """What each row of the table is like."""

    kept: pa.Array
    """large_string [rows]: id of the kept clip, or empty."""
    distance: pa.Array
    """float64 [rows]: how far or how close it is; null where `kept` is empty."""


def hash_duplicates(table: pa.Table, config: DedupConfig, order: NDArray[np.int64]) -> Alike:
    """Exact and near duplicates by `phash`.

    Args:
        order: rows that take part, the best first.
    """
    if "phash" not in table.column_names:
        return _alike(table, order, np.full(len(order), -1), np.full(len(order), np.nan))
    frames = Frames.parse(table.column("phash")).take(order)
    seconds = _numbers(table, "duration")[order]
    same = equal_clips(frames, seconds)
    distinct = np.flatnonzero(same == np.arange(len(order)))
    groups = frames.take(distinct)
    pairs = near_pairs(groups, float(config.hash_distance), seconds[distinct])
    centre, distance = stars(len(distinct), pairs)
    # Of those with equal frames all but the best go with the best, wherever that one goes.
    group = np.searchsorted(distinct, same)
    goes_to = np.where(centre[group] >= 0, distinct[centre[group]], same)
    is_copy = goes_to != np.arange(len(order))
    apart = np.where(centre[group] >= 0, distance[group], 0.0)
    return _alike(table, order, np.where(is_copy, goes_to, -1), apart)


def semantic_duplicates(
    table: pa.Table, vectors: Vectors, config: DedupConfig, order: NDArray[np.int64]
) -> Alike:
    """Duplicates by embeddings; `distance` is the cosine.

    Args:
        vectors: embeddings of the rows in `order`, norm 1.
        order: rows that take part, the best first.
    """
    if config.similarity is None:
        return _alike(table, order, np.full(len(order), -1), np.full(len(order), np.nan))
    pairs = similar_pairs(vectors, config.similarity, config.seed)
    centre, distance = stars(len(order), pairs)
    return _alike(table, order, centre, 1 - distance)


def concept_ranks(
    table: pa.Table,
    vectors: Vectors,
    config: DedupConfig,
    order: NDArray[np.int64],
    ranked: NDArray[np.bool_],
) -> tuple[pa.Array, pa.Array]:
    """The concept of each row, and its rank in it: int32 [rows], null where there is none.

    Args:
        vectors: embeddings of the rows in `order`, norm 1.
        order: rows that get a concept, in an order that is the same for the same clips.
        ranked: which of `order` get a rank.
    """
    assert config.concepts is not None
    number, _ = concepts(vectors, config.concepts, config.seed)
    concept = np.full(table.num_rows, -1, np.int64)
    concept[order] = number
    ids = np.asarray(pc.rank(table.column("id").cast(pa.large_string())))
    aesthetic = np.nan_to_num(-_numbers(table, "aesthetic"), nan=np.inf)
    rows = order[ranked]
    rows = rows[np.lexsort((ids[rows], aesthetic[rows], concept[rows]))]
    sizes = np.bincount(concept[rows]) if len(rows) else np.zeros(0, np.int64)
    rank = np.zeros(table.num_rows, np.int64)
    rank[rows] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + 1
    return (
        pa.array(concept, mask=concept < 0).cast(pa.int32()),
        pa.array(rank, mask=rank == 0).cast(pa.int32()),
    )


def _best_first(table: pa.Table) -> NDArray[np.int64]:
    """Rows from the one that is kept before all others."""
    ids = table.column("id").cast(pa.large_string())
    if ids.null_count or pc.count_distinct(ids).as_py() != len(ids):
        raise KinemaError("column 'id' has a missing value, or one that is there twice")
    pixels = _numbers(table, "resolution")
    if np.isnan(pixels).all():
        pixels = _numbers(table, "height") * _numbers(table, "width")
    by_id = np.asarray(pc.sort_indices(ids)).astype(np.int64)
    worse = [
        np.nan_to_num(-values[by_id], nan=np.inf)
        for values in (_numbers(table, "duration"), pixels)
    ]
    order: NDArray[np.int64] = by_id[np.lexsort(tuple(worse))]
    return order


def _numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    if name not in table.column_names or pa.types.is_null(table.column(name).type):
        return np.full(table.num_rows, np.nan)
    values: NDArray[np.float64] = table.column(name).cast(pa.float64(), safe=False).to_numpy()
    return values


def _alike(
    table: pa.Table,
    order: NDArray[np.int64],
    centre: NDArray[np.int64],
    distance: NDArray[np.float64],
) -> Alike:
    """What was found for the rows in `order`, as columns of the table."""
    ids = table.column("id").combine_chunks().cast(pa.large_string())
    target = np.full(table.num_rows, -1, np.int64)
    far = np.full(table.num_rows, np.nan)
    copies = np.flatnonzero(centre >= 0)
    target[order[copies]] = order[centre[copies]]
    far[order[copies]] = distance[copies]
    kept = pc.fill_null(ids.take(pa.array(target, mask=target < 0)), "")
    return Alike(kept, pa.array(far, mask=np.isnan(far)))


def _blank(texts: pa.Array) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = pc.equal(texts, "").to_numpy(zero_copy_only=False)
    return mask
