"""What a checkpoint says of itself to those that generate from it."""

from __future__ import annotations

import pytest

from kinema.config.recipe import load_recipe
from kinema.training.components import SeenData, pipeline_config
from kinema.training.config import TrainRecipe


@pytest.mark.parametrize(
    ("name", "align", "taken_over"), [("tiny/smoke", 2, 2), ("tiny/smoke-1.1", None, 4)]
)
def test_references_begin_where_chunks_do(name: str, align: int | None, taken_over: int) -> None:
    recipe = load_recipe(name, TrainRecipe)
    config = pipeline_config(
        recipe, vae_weights=None, text_weights=None, data=SeenData(sizes=(), fps=8.0)
    )
    assert (config.align, config.frames_taken_over) == (align, taken_over)
