"""A pipeline small enough to run in milliseconds, with random weights that say something."""

from __future__ import annotations

import torch

from kinema.diffusion.config import RectifiedFlowConfig
from kinema.generation.config import PipelineConfig, TextComponent, TrainedSize, VAEComponent
from kinema.generation.parts import Parts
from kinema.generation.pipeline import Pipeline
from kinema.models.build import build_text_encoder, build_transformer, build_vae
from kinema.models.config import (
    HashTextConfig,
    STDiT3Config,
    VAE2DConfig,
    VAETemporalConfig,
    VideoVAEConfig,
)


def tiny_vae() -> VideoVAEConfig:
    return VideoVAEConfig(
        vae_2d=VAE2DConfig(block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=4),
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


def tiny_config(*, vae_weights: str | None = None) -> PipelineConfig:
    return PipelineConfig(
        model=STDiT3Config(
            depth=1,
            hidden_size=32,
            num_heads=2,
            caption_channels=16,
            model_max_length=8,
            input_sq_size=32,
        ),
        vae=VAEComponent(config=tiny_vae(), weights=vae_weights),
        text=TextComponent(config=HashTextConfig(dim=16, max_tokens=8)),
        diffusion=RectifiedFlowConfig(num_sampling_steps=3, cfg_scale=4.0),
        buckets=(TrainedSize(width=32, height=32, num_frames=17),),
        fps=8.0,
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


def tiny_pipeline() -> Pipeline:
    config = tiny_config()
    return Pipeline(config, tiny_parts(config), device="cpu")
