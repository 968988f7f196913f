"""Which clip of several alike is kept: star clusters around kept clips.

Clips are gone through from the best to the worst. One that is close to a clip that was kept before
becomes its duplicate, any other is kept. So every dropped clip is close to the clip that it names,
which connected components do not give: there a chain of small steps joins clips that have nothing
in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pairs:
    """Clips that are close to each other, each pair once; clips are numbered from the best."""

    first: NDArray[np.int64]
    """[pairs]; smaller than `second`."""
    second: NDArray[np.int64]
    distance: NDArray[np.float64]


def stars(count: int, pairs: Pairs) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Keep the best of what is close together.

    Args:
        count: clips, numbered from the best to be kept.

    Returns:
        for each clip the kept one that it duplicates (-1: it is kept itself) and the distance to
        it (NaN where it is kept). Of several kept ones the closest, then the best.
    """
    centre = np.full(count, -1, np.int64)
    distance = np.full(count, np.nan)
    order = np.lexsort((pairs.first, pairs.distance, pairs.second))
    first, second, apart = pairs.first[order], pairs.second[order], pairs.distance[order]
    # A clip's fate depends on better ones only, so ascending numbers settle it in one pass.
    changes = np.flatnonzero(second[1:] != second[:-1]) + 1
    for start, end in pairwise([0, *changes, len(second)]):
        kept = np.flatnonzero(centre[first[start:end]] < 0)
        if len(kept):
            nearest = start + kept[0]
            centre[second[start]] = first[nearest]
            distance[second[start]] = apart[nearest]
    return centre, distance
