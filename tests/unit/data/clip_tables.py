"""Manifests without files, for tests of buckets and order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kinema.config.recipe import load_recipe
from kinema.data.buckets import BucketTable
from kinema.data.like import openvid_like
from kinema.data.manifest import Manifest
from kinema.data.order import Cost, Degree, SampleOrder
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost


def manifest(
    num_frames: NDArray[np.int64], height: NDArray[np.int64], width: NDArray[np.int64]
) -> Manifest:
    names = [f"{i}.mp4" for i in range(len(num_frames))]
    return Manifest.from_columns(
        {
            "path": names,
            "text": names,
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "fps": np.full(len(names), 24.0),
        },
        ".",
    )


def generated(rows: int, images: float = 0.2, seed: int = 0) -> Manifest:
    return manifest(*openvid_like(rows, images, seed))


def stage(number: int) -> tuple[BucketTable, Cost]:
    """Buckets and costs of a published recipe."""
    recipe = load_recipe(f"opensora-1.2/stage{number}", TrainRecipe)
    return BucketTable.from_config(recipe.data), bucket_cost(recipe)


def order_of(
    clips: Manifest,
    number: int,
    world_size: int,
    *,
    seed: int = 0,
    accumulation: int = 1,
    degree: Degree = lambda bucket: 1,
) -> SampleOrder:
    table, cost = stage(number)
    return SampleOrder(
        clips,
        table,
        cost,
        seed=seed,
        world_size=world_size,
        accumulation=accumulation,
        degree=degree,
    )
