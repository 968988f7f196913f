"""Runs whole trainings on two ranks, sharded and not, in forked children.

    python -m tests.integration.sharded_driver MANIFEST OUTPUTS BROKEN

BROKEN is a manifest with files that cannot be read. Each scenario leaves what those of
`rank_driver` leave.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.integration import rank_driver
from tests.integration.rank_driver import OUTPUTS, run

ZERO2, ZERO3 = ("parallel.shard=zero2",), ("parallel.shard=zero3", "recompute=full")
COMMON = ("max_steps=4", "optim.eps=0.01", "precision=fp32")
PREVIEW = "preview={every: 4, prompts: [a], num_sampling_steps: 1}"
FEW = (
    *("data.buckets.16x16.5=[1.0,1]", "data.max_bad_fraction=0.9", "accumulation=2"),
    *("optim.eps=0.01", "precision=fp32", "max_steps=2"),
)
"""One clip to a micro-batch: a rank whose clip cannot be read has nothing to compute."""


def main() -> None:
    OUTPUTS.mkdir()
    run("copies", 2, *COMMON)
    run("zero2", 2, *COMMON, *ZERO2, PREVIEW)
    run("zero3", 2, *COMMON, *ZERO3)
    run("resumed", 2, *COMMON, *ZERO3, "max_steps=2")
    run("resumed", 2, *COMMON, *ZERO3, load=True)
    run("spoiled", 2, *COMMON, *ZERO3, spoil=1)
    run("alone", 1, *COMMON, *ZERO2, "accumulation=2")
    rank_driver.MANIFEST = Path(sys.argv[3])
    run("broken", 2, *FEW)
    run("broken-zero3", 2, *FEW, *ZERO3)


if __name__ == "__main__":
    main()
