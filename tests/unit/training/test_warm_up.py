"""Which micro-batches are tried before step one, and what they are made of."""

from __future__ import annotations

import torch

from kinema.config.recipe import load_recipe
from kinema.data.manifest import Manifest
from kinema.parallel.world import World
from kinema.training.config import TrainRecipe
from kinema.training.estimate import order_of
from kinema.training.warm_up import made_up, trials

ALONE = World(0, 1, torch.device("cpu"))


def clips_of(sides: list[int], texts: list[str], dropped: dict[int, str]) -> Manifest:
    count = len(sides)
    columns = {
        "path": [f"{i}.mp4" for i in range(count)],
        "text": texts,
        "num_frames": [9] * count,
        "height": sides,
        "width": sides,
        "fps": [24.0] * count,
    }
    return Manifest.from_columns(columns, ".").with_dropped(dropped)


def test_the_largest_of_every_bucket_that_has_clips_comes_first() -> None:
    buckets = '{"16x16": {5: [1.0, 4]}, "32x32": {5: [1.0, 4]}, "64x64": {5: [1.0, 4]}}'
    recipe = load_recipe("tiny/smoke", TrainRecipe, [f"data.buckets=!replace {buckets}"])
    texts = ["short", "a longer one", "the longest of all, but dropped", *["x"] * 6]
    clips = clips_of([32, 32, 32, *[16] * 6], texts, {2: "blurred"})
    found = trials(recipe, order_of(recipe, clips, 1), 0, ALONE)
    assert [(t.bucket.resolution, t.clips, t.degree) for t in found] == [
        ("32x32", 2, 1),  # there are no more
        ("16x16", 4, 1),
    ]
    assert found[0].predicted > found[1].predicted
    batch = made_up(found[0], recipe, clips)
    assert batch.video.shape == (2, 3, 5, 32, 32)
    assert batch.text == ["a longer one"] * 2
    assert batch.latents is None

    cached = load_recipe("tiny/smoke", TrainRecipe, [
        f"data.buckets=!replace {buckets}", "latent_cache=there", "task.remember_latents=false",
    ])  # fmt: skip
    batch = made_up(found[0], cached, clips)
    assert len(batch.video) == 0
    assert batch.latents is not None
    assert batch.latents[0].shape == (2, 4, *cached.vae.latent_size(5, 32, 32))
