"""What `components.json` of a checkpoint says: enough to use it without the recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kinema.config.settings import to_dict
from kinema.generation.config import PipelineConfig, TrainedSize, VAEComponent
from kinema.training.config import TrainRecipe, VAETask


def components(
    recipe: TrainRecipe,
    run: Path,
    *,
    vae_weights: Path | None,
    sizes: tuple[TrainedSize, ...],
    fps: float,
) -> dict[str, Any]:
    """Plain data: a `PipelineConfig`, or of an autoencoder its settings only.

    Args:
        run: the run folder.
        vae_weights: file or checkpoint of the frozen autoencoder.
        sizes: shapes trained at, the most frequent first.
        fps: frame rate of the data.
    """
    if isinstance(recipe.task, VAETask):
        # Shift and scale are measured and live in the weights, which is what readers go by.
        return {"vae": {"config": to_dict(recipe.vae)}}
    assert recipe.model is not None
    assert recipe.text is not None
    assert recipe.diffusion is not None
    weights = None
    if vae_weights is not None:
        outputs, file = run.absolute().parent, vae_weights.absolute()
        # Relative to a checkpoint folder where both moved together stay together.
        near = file.is_relative_to(outputs)
        weights = os.path.relpath(file, run.absolute() / "checkpoint") if near else str(file)
    return to_dict(
        PipelineConfig(
            model=recipe.model,
            vae=VAEComponent(config=recipe.vae, weights=weights),
            text=recipe.text,
            diffusion=recipe.diffusion,
            buckets=sizes,
            fps=fps,
        )
    )
