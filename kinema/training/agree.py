"""What ranks that share a micro-batch agree on before they compute."""

from __future__ import annotations

from dataclasses import replace

from kinema.data.loader import Batch
from kinema.parallel.sequence import SequenceGroups


def agree_on_rows(batch: Batch, groups: SequenceGroups) -> Batch:
    """The micro-batch without the rows that any of its ranks could not read.

    A file may time out on one rank alone; the others leave it out as well, so that all compute the
    same. Collective among the ranks that share it.

    Args:
        batch: the same micro-batch on each of them, but for what could not be read.
        groups: the present degree counts.
    """
    lost = {bad.row: bad for skipped in groups.gather(batch.skipped) for bad in skipped}
    agreed = batch.without(lost.keys()) if len(lost) > len(batch.skipped) else batch
    return replace(agreed, skipped=[lost[row] for row in sorted(lost)])
