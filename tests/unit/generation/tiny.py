"""Pipelines of every family, small enough to run in milliseconds, with random weights that say
something.

`tiny_pipeline("stdit2")` makes one that is handed its networks; `write_run` makes a run folder that
`Pipeline.from_pretrained` and `kinema generate` read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kinema.checkpoint.run import save_checkpoint
from kinema.checkpoint.weights import save_weights
from kinema.config.settings import to_dict
from kinema.diffusion.config import IDDPMConfig, ProcessConfig, RectifiedFlowConfig
from kinema.generation.config import PipelineConfig, TextComponent, TrainedSize, VAEComponent
from kinema.generation.parts import Parts
from kinema.generation.pipeline import Pipeline
from kinema.models.build import build_text_encoder, build_transformer, build_vae
from kinema.models.config import (
    ClassTextConfig,
    DiTConfig,
    HashTextConfig,
    ImageVAEConfig,
    LatteConfig,
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TextConfig,
    TransformerConfig,
    VAE2DConfig,
    VAEConfig,
    VAETemporalConfig,
    VideoVAEConfig,
)

FAMILIES = ("stdit3", "stdit2", "stdit", "pixart", "dit", "latte")
"""Every transformer, with the process, autoencoder and text that its generation has."""
WITH_FRAMES = ("stdit3", "stdit2", "stdit")
"""Those that can be given frames."""
PROMPTS = {"dit": ("3", "7", "0"), "latte": ("3", "7", "0")}
"""Three prompts for a family: classes, or else these texts."""
TEXTS = ("a red kite over the sea", "x", "two words here")

IMAGE_2D = VAE2DConfig(block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=4)


def tiny_vae() -> VideoVAEConfig:
    return VideoVAEConfig(
        vae_2d=IMAGE_2D,
        vae_temporal=VAETemporalConfig(
            filters=4,
            channel_multipliers=(1, 1, 1),
            temporal_downsample=(True, True),
            num_res_blocks=1,
            num_groups=4,
        ),
        shift=(0.0, 0.0, 0.0, 0.0),
        scale=(1.0, 1.0, 1.0, 1.0),
    )


def tiny_image_vae() -> ImageVAEConfig:
    return ImageVAEConfig(vae_2d=IMAGE_2D, scaling_factor=1.0)


def tiny_config(
    family: str = "stdit3",
    *,
    vae_weights: str | None = None,
    sampler: str = "iddpm",
    **model: Any,
) -> PipelineConfig:
    """The settings of a family's pipeline.

    Args:
        sampler: of those that are trained with IDDPM.
        model: settings of the transformer that differ.
    """
    frames = {"stdit3": 17, "pixart": 1, "dit": 1}.get(family, 6)
    return PipelineConfig(
        model=_model(family, model),
        vae=VAEComponent(config=_vae(family), weights=vae_weights),
        text=TextComponent(config=_text(family)),
        diffusion=_process(family, sampler),
        buckets=(TrainedSize(width=32, height=32, num_frames=frames),),
        fps=8.0,
        align=5 if family == "stdit3" else None,
        condition_frame_length=5 if family == "stdit3" else 2,
    )


def _model(family: str, changes: dict[str, Any]) -> TransformerConfig:
    shared: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2}
    caption = {"caption_channels": 16, "model_max_length": 8}
    classes = {"condition": "label_10"}
    if family == "stdit3":
        return STDiT3Config(**shared | caption | {"input_sq_size": 32} | changes)
    if family == "stdit2":
        thirds = {"hidden_size": 48, "input_sq_size": 32}
        return STDiT2Config(**shared | caption | thirds | changes)
    if family == "stdit":
        return STDiTConfig(**shared | caption | {"input_size": (6, 8, 8)} | changes)
    if family == "pixart":
        return PixArtConfig(**shared | caption | {"input_size": (1, 8, 8)} | changes)
    if family == "dit":
        image = {"input_size": (1, 8, 8), "no_temporal_pos_emb": True}
        return DiTConfig(**shared | classes | image | changes)
    assert family == "latte"
    return LatteConfig(**shared | classes | {"input_size": (6, 8, 8)} | changes)


def _vae(family: str) -> VAEConfig:
    return tiny_vae() if family == "stdit3" else tiny_image_vae()


def _text(family: str) -> TextConfig:
    if family in ("dit", "latte"):
        return ClassTextConfig(num_classes=10)
    return HashTextConfig(dim=16, max_tokens=8)


def _process(family: str, sampler: str) -> ProcessConfig:
    if family == "stdit3":
        return RectifiedFlowConfig(num_sampling_steps=3, cfg_scale=4.0)
    assert sampler in ("iddpm", "dpm-solver")
    return IDDPMConfig(
        sampler="iddpm" if sampler == "iddpm" else "dpm-solver",
        num_sampling_steps=3,
        cfg_scale=4.0,
    )


def tiny_parts(config: PipelineConfig) -> Parts:
    torch.manual_seed(0)
    model, vae = build_transformer(config.model), build_vae(config.vae.config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Layers that start at zero would hide the text and the guidance.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return Parts(
        model=model.eval(),
        vae=vae.eval(),
        text=build_text_encoder(config.text.config),
        identity={"checkpoint": "nowhere"},
    )


def tiny_pipeline(family: str = "stdit3", **settings: Any) -> Pipeline:
    """A pipeline of a family; settings as for `tiny_config`."""
    config = tiny_config(family, **settings)
    return Pipeline(config, tiny_parts(config), device="cpu")


def prompts_of(family: str) -> tuple[str, ...]:
    """Three prompts that a family's text side takes."""
    return PROMPTS.get(family, TEXTS)


def write_run(folder: Path, family: str = "stdit3", **settings: Any) -> Path:
    """A run folder with one checkpoint of a family and its autoencoder beside it.

    Returns:
        The checkpoint's folder, `folder/000-tiny/epoch0-global_step5`.
    """
    config = tiny_config(family, vae_weights="../../vae.safetensors", **settings)
    parts = tiny_parts(config)
    run = folder / "000-tiny"
    run.mkdir(parents=True)
    save_weights(folder / "vae.safetensors", parts.vae.state_dict())
    weights = parts.model.state_dict()
    averaged = {
        name: tensor * 0.9 if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    saved = save_checkpoint(
        run, 0, 5, model=weights, ema=averaged, state={}, components=to_dict(config)
    )
    return saved.path
