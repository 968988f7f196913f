"""What a latent cache keeps when more is encoded into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kinema.data.latent_cache_writer import Clip, LatentCacheWriter

MADE_FROM = {"videos": "v", "vae": {}, "weights": None, "frame_interval": 1}
SIZE = (16, 16)


def write(writer: LatentCacheWriter, rows: Sequence[int], frames: int) -> None:
    latents = [(np.full((1, frames, 2, 2), float(row), np.float32),) * 2 for row in rows]
    clips = [Clip(row, frames, *SIZE) for row in rows]
    writer.write(clips, latents, [24.0] * len(rows), [SIZE] * len(rows))


def test_longer_clips_of_a_later_recipe_cost_no_others(tmp_path: Path) -> None:
    """The same first row and as many clips, of which some are others."""
    writer = LatentCacheWriter(tmp_path, MADE_FROM)
    write(writer, [0, 1], frames=4)
    write(writer, [0, 2], frames=8)
    assert writer.there(*SIZE) == {0: 8, 1: 4, 2: 8}
    assert writer.finish(3) == {SIZE: 3}


def test_the_longest_counts_whatever_its_file_is_called(tmp_path: Path) -> None:
    writer = LatentCacheWriter(tmp_path, MADE_FROM)
    write(writer, [5, 6], frames=4)
    write(writer, [3, 6], frames=8)  # comes first by name
    assert writer.there(*SIZE) == {3: 8, 5: 4, 6: 8}
