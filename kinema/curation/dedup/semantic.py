"""Semantic duplicates and concepts, by embeddings of clips.

Embeddings have norm 1, so a dot product is a cosine. Below `EXACT` clips all pairs are compared;
more are put into clusters first, each into its two nearest ones, so that two alike on both sides of
a border meet.

Clusters are found by spherical k-means (Lloyd's iterations from k-means++ seeds). Rows are worked
on in blocks of a fixed size, by one thread each: the result is the same for any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.curation.dedup.stars import Pairs

EXACT = 8192
"""Clips of which all pairs are compared."""
CLUSTER_SIZE = 1000
"""Clips of a cluster on average, when semantic duplicates are looked for."""
NEIGHBOURS = 256
"""Better clips that each one is paired with at most, the best of them: which of thousands that are
all alike is kept does not need every pair."""
ROWS = 4096
"""Rows that one thread works on at once."""
ITERATIONS = 20
TRAINED_ON = 256
"""Rows for each cluster that centres are found from, at most."""

Vectors = NDArray[np.float32]


def vectors_of(column: pa.Array | pa.ChunkedArray) -> tuple[Vectors, NDArray[np.bool_]]:
    """Embeddings as [with an embedding, channels] of norm 1, and which rows have one [rows].

    Args:
        column: lists of float, all of one length; null where there is none.

    Raises:
        KinemaError: lengths differ, or values are not finite.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    there = [~np.asarray(chunk.is_null()) for chunk in chunks]
    has = np.concatenate(there or [np.zeros(0, np.bool_)])
    parts, widths = [], set()
    for chunk in chunks:
        valid = chunk.drop_null()
        if len(valid):
            flat = valid.flatten().to_numpy(zero_copy_only=False)
            lengths = np.asarray(valid.value_lengths()) if pa.types.is_list(valid.type) or (
                pa.types.is_large_list(valid.type)
            ) else np.full(len(valid), valid.type.list_size)  # fmt: skip
            widths.update(np.unique(lengths).tolist())
            parts.append(flat)
    if len(widths) > 1:
        raise KinemaError(f"embeddings have different lengths: {sorted(widths)}")
    if not parts:
        return np.zeros((0, 1), np.float32), has
    vectors = np.concatenate(parts).astype(np.float32, copy=False).reshape(-1, widths.pop())
    norms = np.sqrt(np.einsum("nc,nc->n", vectors, vectors, dtype=np.float64))
    if not np.isfinite(norms).all() or not norms.all():
        raise KinemaError("an embedding is zero or not finite", hint="run the stage `embed` again")
    return np.divide(vectors, norms[:, None].astype(np.float32)), has


def similar_pairs(vectors: Vectors, least: float, seed: int = 0) -> Pairs:
    """Pairs of rows whose cosine is at least `least`; the distance is 1 - cosine.

    Args:
        vectors: [rows, channels], norm 1; the best to be kept first.
    """
    count = len(vectors)
    if count <= EXACT:
        members = [np.arange(count)]
    else:
        nearest = _nearest(vectors, cluster(vectors, -(-count // CLUSTER_SIZE), seed), 2)
        owner = np.repeat(np.arange(count), 2)[np.argsort(nearest.ravel(), kind="stable")]
        members = np.split(owner, np.cumsum(np.bincount(nearest.ravel()))[:-1])

    def compare(rows: NDArray[np.int64]) -> list[Any]:
        import torch

        found = []
        inside = vectors[rows]
        for first in range(0, len(rows), ROWS):
            block = torch.from_numpy(inside[first : first + ROWS])
            cosine = (block @ torch.from_numpy(inside[: first + ROWS]).T).numpy()
            close = np.tril(cosine >= least, first - 1)  # with better ones only
            if close.sum(1).max(initial=0) > NEIGHBOURS:
                close &= np.cumsum(close, 1, dtype=np.int32) <= NEIGHBOURS
            at, better = np.nonzero(close)
            found.append((rows[better], rows[first + at], cosine[at, better]))
        return found

    found = [part for parts in _in_threads(compare, members) for part in parts]
    better = np.concatenate([part[0] for part in found] or [np.zeros(0, np.int64)])
    worse = np.concatenate([part[1] for part in found] or [np.zeros(0, np.int64)])
    cosine = np.concatenate([part[2] for part in found] or [np.zeros(0)]).astype(np.float64)
    packed, index = np.unique(better * count + worse, return_index=True)
    return Pairs(packed // count, packed % count, np.maximum(1 - cosine[index], 0.0))


def cluster(vectors: Vectors, count: int, seed: int = 0) -> Vectors:
    """Centres of clusters by spherical k-means.

    Args:
        vectors: [rows, channels], norm 1; their order matters (sort rows by something first).

    Returns:
        [clusters, channels], norm 1; fewer than `count` where there are fewer rows.
    """
    random = np.random.default_rng(seed)
    count = min(count, len(vectors))
    if count * TRAINED_ON < len(vectors):
        chosen = np.sort(random.choice(len(vectors), count * TRAINED_ON, replace=False))
        vectors = vectors[chosen]
    centres = _seeds(vectors, count, random)
    before = None
    for _ in range(ITERATIONS):
        nearest = _nearest(vectors, centres, 1)[:, 0]
        if before is not None and np.array_equal(nearest, before):
            break
        before = nearest
        centres = _means(vectors, nearest, centres)
    return centres


def _seeds(vectors: Vectors, count: int, random: np.random.Generator) -> Vectors:
    """k-means++ on a sample: each further centre is a row far from those before."""
    if count > 256:  # its cost grows with the square of the count, its use fades
        return vectors[np.sort(random.choice(len(vectors), count, replace=False))].copy()
    sample = vectors[: 64 * count] if len(vectors) > 64 * count else vectors
    if len(vectors) > len(sample):
        sample = vectors[np.sort(random.choice(len(vectors), 64 * count, replace=False))]
    chosen = [int(random.integers(len(sample)))]
    far = 1 - _dot(sample, sample[chosen[0]])
    while len(chosen) < count:
        weights = np.maximum(far, 0) ** 2
        weights[chosen] = 0
        total = weights.sum()
        if total > 0:
            place = np.searchsorted(np.cumsum(weights), random.random() * total, "right")
            chosen.append(int(min(place, len(sample) - 1)))
        else:  # all rows that are left equal a centre
            chosen.append(int(np.setdiff1d(np.arange(len(sample)), chosen)[0]))
        far = np.minimum(far, 1 - _dot(sample, sample[chosen[-1]]))
    return sample[chosen].copy()


def _dot(vectors: Vectors, one: Vectors) -> NDArray[np.float64]:
    products: NDArray[np.float64] = np.einsum("nc,c->n", vectors, one).astype(np.float64)
    return products


def _means(vectors: Vectors, nearest: NDArray[np.int64], centres: Vectors) -> Vectors:
    """Mean directions; a cluster without rows stays where it was."""
    order = np.argsort(nearest, kind="stable")
    numbers, begins = np.unique(nearest[order], return_index=True)
    new = centres.copy()
    for number, begin, end in zip(numbers, begins, [*begins[1:], len(order)], strict=True):
        total = vectors[order[begin:end]].sum(0, dtype=np.float64)
        length = np.sqrt((total**2).sum())
        if length > 0:
            new[number] = (total / length).astype(np.float32)
    return new


def _nearest(vectors: Vectors, centres: Vectors, count: int) -> NDArray[np.int64]:
    """The `count` nearest centres of each row, nearest first; of equal ones the lower number."""

    def assign(first: int) -> NDArray[np.int64]:
        import torch

        block = torch.from_numpy(vectors[first : first + ROWS])
        cosine = (block @ torch.from_numpy(centres).T).numpy()
        found = np.empty((len(cosine), min(count, cosine.shape[1])), np.int64)
        for place in range(found.shape[1]):
            found[:, place] = cosine.argmax(1)
            cosine[np.arange(len(cosine)), found[:, place]] = -np.inf
        return found

    return np.concatenate(_in_threads(assign, range(0, len(vectors), ROWS)))


def _in_threads(function: Callable[[Any], Any], items: Any) -> list[Any]:
    """Results in order. Threads of the matrix product are switched off: they would share the work
    out by their number, and sums would depend on it."""
    with _one_thread(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(function, items))


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def concepts(
    vectors: Vectors, count: int, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The concept of each row, from 0, the largest first; and its cosine to the concept's centre.

    Args:
        vectors: [rows, channels], norm 1; their order matters (sort rows by something first).
    """
    if not len(vectors):
        return np.zeros(0, np.int64), np.zeros(0)
    centres = cluster(vectors, count, seed)
    nearest = _nearest(vectors, centres, 1)[:, 0]
    numbers, first, sizes = np.unique(nearest, return_index=True, return_counts=True)
    renamed = np.zeros(len(centres), np.int64)
    renamed[numbers[np.lexsort((first, -sizes))]] = np.arange(len(numbers))
    cosine = np.einsum("nc,nc->n", vectors, centres[nearest]).astype(np.float64)
    return renamed[nearest], cosine
