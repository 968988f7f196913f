"""What `components.json` of a checkpoint says: enough to use it without the recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kinema.config.settings import to_dict
from kinema.generation.config import PipelineConfig, TextComponent, TrainedSize, VAEComponent
from kinema.training.config import TrainRecipe, VAETask


@dataclass(frozen=True)
class SeenData:
    """What a model has seen of its data.

    Attributes:
        sizes: shapes trained at, the most frequent first.
        fps: frame rate that it was told.
        frame_interval: frames of a file per frame of a clip, where it was told the file's rate.
    """

    sizes: tuple[TrainedSize, ...]
    fps: float
    frame_interval: int = 1


def describe_model(
    recipe: TrainRecipe,
    *,
    vae_weights: str | None,
    text_weights: str | None,
    data: SeenData,
) -> dict[str, Any]:
    """Plain data: a `PipelineConfig`, or of an autoencoder its settings only.

    Args:
        vae_weights: where the frozen autoencoder's weights are, see `weights_seen_from`.
        text_weights: likewise of the text encoder, if it has any.
    """
    if isinstance(recipe.task, VAETask):
        # Shift and scale are measured and live in the weights, which is what readers go by.
        return {"vae": {"config": to_dict(recipe.vae)}}
    config = pipeline_config(recipe, vae_weights=vae_weights, text_weights=text_weights, data=data)
    return to_dict(config)


def pipeline_config(
    recipe: TrainRecipe,
    *,
    vae_weights: str | None,
    text_weights: str | None,
    data: SeenData,
) -> PipelineConfig:
    """What generates from the model of a text-to-video recipe."""
    assert recipe.model is not None
    assert recipe.text is not None
    assert recipe.diffusion is not None
    return PipelineConfig(
        model=recipe.model,
        vae=VAEComponent(config=recipe.vae, weights=vae_weights),
        text=TextComponent(config=recipe.text, weights=text_weights),
        diffusion=recipe.diffusion,
        buckets=data.sizes,
        fps=data.fps,
        frame_interval=data.frame_interval,
        # As 1.2 does: an image is encoded as the beginning of a chunk, so that is where it goes.
        align=recipe.vae.latent_chunk,
    )


def weights_seen_from(run: Path, weights: Path) -> str:
    """A path as a checkpoint of `run` names it: relative where both lie in one outputs folder, so
    that they may move together."""
    run, weights = run.absolute(), weights.absolute()
    if not weights.is_relative_to(run.parent):
        return str(weights)
    return os.path.relpath(weights, run / "checkpoint")
