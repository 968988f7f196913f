"""A handful of real clips and the smallest recipe over them, for tests of training."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from kinema.checkpoint.weights import save_weights
from kinema.config.recipe import load_recipe
from kinema.data.index import index_folder
from kinema.data.manifest import Manifest
from kinema.data.world import WorldSpec, write_world
from kinema.models.build import build_vae
from kinema.training.config import TrainRecipe


def write_clips(folder: Path, *, count: int = 24, seed: int = 0, frames: int = 7) -> Path:
    """A manifest of `count` clips of 16x16."""
    spec = WorldSpec(seed=seed, count=count, size=16, frames=frames, hold_out=4)
    captions = write_world(folder / "clips", spec)
    manifest = folder / "clips.parquet"
    index_folder(folder / "clips", manifest, captions=captions, workers=1)
    return manifest


def smoke(manifest: Path, outputs: Path, *overrides: str, name: str = "tiny/smoke") -> TrainRecipe:
    """`tiny/smoke` over the clips; overrides as on the command line."""
    places = [f"data.path='{manifest}'", f"outputs='{outputs}'"]
    places += ["tracking.tensorboard=false", "ckpt_every=100"]
    return load_recipe(name, TrainRecipe, [*places, *overrides])


def write_classes(manifest: Path, *, classes: int) -> Path:
    """A copy of a manifest whose captions are numbers of classes, in turn."""
    table = Manifest.read(manifest).table
    numbers = pa.array([str(row % classes) for row in range(len(table))])
    table = table.set_column(table.column_names.index("text"), "text", numbers)
    path = manifest.with_name(f"classes-{classes}.parquet")
    Manifest(table, manifest.parent).write(path)
    return path


def write_vae(path: Path, *, recipe: str) -> Path:
    """Weights of a random autoencoder, as the recipe has it."""
    vae = build_vae(load_recipe(recipe, TrainRecipe).vae)
    save_weights(path, vae.state_dict())
    return path
