"""Every network in a tiny size, with random weights, and one forward pass of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kinema.models.autoencoder import Autoencoder
from kinema.models.build import build_transformer, build_vae
from kinema.models.config import (
    DiTConfig,
    ImageVAEConfig,
    KVCompressConfig,
    LatteConfig,
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    VAE2DConfig,
    VAETemporalConfig,
    VideoVAEConfig,
)
from kinema.models.transformer import ClipShape, Transformer

SIZE = {"depth": 2, "hidden_size": 24, "num_heads": 1}
CAPTION = {"caption_channels": 10, "model_max_length": 6}
VAE_2D = VAE2DConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8)

CONFIGS: dict[str, Any] = {
    "stdit3": STDiT3Config(**SIZE, **CAPTION),
    "stdit3 without norm or variance": STDiT3Config(
        **SIZE, **CAPTION, qk_norm=False, pred_sigma=False
    ),
    "stdit2": STDiT2Config(**SIZE, **CAPTION),
    "stdit": STDiTConfig(**SIZE, **CAPTION, input_size=(4, 8, 8)),
    "dit": DiTConfig(**SIZE, condition="label_7", input_size=(1, 8, 8), no_temporal_pos_emb=True),
    "dit of captions": DiTConfig(
        **SIZE, condition="text", caption_channels=10, input_size=(4, 8, 8)
    ),
    "latte": LatteConfig(**SIZE, condition="label_101", input_size=(4, 8, 8)),
    "pixart": PixArtConfig(**SIZE, **CAPTION, input_size=(1, 8, 8)),
    "pixart with sizes": PixArtConfig(
        **SIZE, **CAPTION, input_size=(1, 8, 8), size_conditions=True, space_scale=2.0
    ),
    "pixart of videos": PixArtConfig(
        **SIZE, **CAPTION, input_size=(4, 8, 8), no_temporal_pos_emb=False
    ),
    "pixart with q/k norm": PixArtConfig(**SIZE, **CAPTION, input_size=(1, 8, 8), qk_norm=True),
    "pixart with fewer keys": PixArtConfig(
        **SIZE,
        **CAPTION,
        input_size=(1, 8, 8),
        kv_compress=KVCompressConfig(scale_factor=2, kv_compress_layer=(1,)),
    ),
    "image vae": ImageVAEConfig(vae_2d=VAE_2D),
    "video vae": VideoVAEConfig(
        vae_2d=VAE_2D,
        vae_temporal=VAETemporalConfig(filters=8, num_res_blocks=1, num_groups=8),
        micro_frame_size=5,
    ),
}
DIFFUSERS = ("dit", "pixart", "pixart with sizes", "image vae")
"""Those with a class in diffusers."""


def network(name: str, seed: int = 0) -> nn.Module:
    """Random weights everywhere, also where training starts from zeros."""
    config = CONFIGS[name]
    vae = isinstance(config, (ImageVAEConfig, VideoVAEConfig))
    module = build_vae(config) if vae else build_transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if key not in ("rope.freqs", "scale"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return module.eval()


def on_meta(name: str) -> nn.Module:
    config = CONFIGS[name]
    vae = isinstance(config, (ImageVAEConfig, VideoVAEConfig))
    with torch.device("meta"):
        module: nn.Module = build_vae(config) if vae else build_transformer(config)
    return module.eval()


def forward(module: nn.Module) -> Tensor:
    """The result of one fixed input."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if isinstance(module, Autoencoder):
            video = torch.randn(1, 3, 5, 16, 16, generator=generator)
            return module.decode(module.encode(video), 5)
        assert isinstance(module, Transformer)
        config = module.config
        frames = config.input_size[0] if hasattr(config, "input_size") else 4
        x = torch.randn(2, 4, frames, 8, 8, generator=generator)
        mask = None
        if isinstance(config, (DiTConfig, LatteConfig)):
            text = torch.tensor([1, 3])
            if config.num_classes is None:
                text = torch.randn(2, 1, 10, generator=generator)
        else:
            text = torch.randn(2, 1, 6, 10, generator=generator)
            mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
        return module.predict(
            x,
            torch.tensor([900.0, 20.0]),
            text,
            mask=mask,
            x_mask=None,
            shape=ClipShape(*(torch.tensor([v, v]) for v in (24.0, 64.0, 64.0, 4.0))),
        )
