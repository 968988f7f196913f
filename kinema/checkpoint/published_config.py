"""The `config.json` that published folders of weights have beside them.

Fields are as far as public conversion programs and folders tell them. Neither diffusers nor
Open-Sora's own code was run on these files.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kinema.models.config import (
    DiTConfig,
    ImageVAEConfig,
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    VideoVAEConfig,
)


def diffusers_config(config: Any) -> dict[str, Any] | None:
    """For the class of diffusers that stands for this network; None if there is none."""
    if isinstance(config, ImageVAEConfig):
        return _autoencoder(config)
    if not isinstance(config, (DiTConfig, PixArtConfig)):
        return None
    content = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "patch_size": config.patch_size[1],
        "sample_size": config.input_size[1],
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    if isinstance(config, DiTConfig):
        content |= {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": config.num_classes}
        return content
    return content | {
        "_class_name": "PixArtTransformer2DModel",
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.hidden_size,
        "interpolation_scale": config.space_scale,
        "use_additional_conditions": config.size_conditions,
    }


def original_config(config: Any) -> dict[str, Any] | None:
    """For Open-Sora's own `from_pretrained`; None where it reads no such file."""
    if isinstance(config, (STDiT2Config, STDiT3Config)):
        name = "STDiT3" if isinstance(config, STDiT3Config) else "STDiT2"
        content = {k: v for k, v in asdict(config).items() if k not in ("type", "attention")}
        return content | {
            "model_type": name,
            "architectures": [name],
            "input_size": [None, None, None],
        }
    if isinstance(config, VideoVAEConfig):
        return {
            "model_type": "VideoAutoencoderPipeline",
            "architectures": ["VideoAutoencoderPipeline"],
            "vae_2d": {
                "type": "VideoAutoencoderKL",
                "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
                "subfolder": "vae",
                "micro_batch_size": config.micro_batch_size,
            },
            "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
            "micro_frame_size": config.micro_frame_size,
            "shift": list(config.shift),
            "scale": list(config.scale),
            "freeze_vae_2d": False,
            "cal_loss": False,
        }
    return _autoencoder(config) if isinstance(config, ImageVAEConfig) else None


def _autoencoder(config: ImageVAEConfig) -> dict[str, Any]:
    levels = len(config.vae_2d.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.vae_2d.block_out_channels),
        "layers_per_block": config.vae_2d.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.vae_2d.norm_num_groups,
        "act_fn": "silu",
        "scaling_factor": config.scaling_factor,
    }
