"""Telling from names and shapes which model a file of weights belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

KNOWN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("STDiT3 (Open-Sora 1.2)", ("spatial_blocks.0.", "temporal_blocks.0.", "fps_embedder.")),
    ("STDiT2 (Open-Sora 1.1)", ("blocks.0.attn_temp.", "fl_embedder.", "t_block_temp.")),
    ("STDiT (Open-Sora 1.0)", ("blocks.0.attn_temp.", "t_block.", "pos_embed_temporal")),
    ("PixArt (image transformer)", ("blocks.0.cross_attn.q_linear.", "t_block.")),
    ("DiT or Latte", ("blocks.0.adaLN_modulation.", "final_layer.adaLN_modulation.")),
    ("MMDiT (Open-Sora 2.0) or FLUX", ("double_blocks.0.", "single_blocks.0.")),
    ("video autoencoder (Open-Sora 1.2)", ("spatial_vae.module.", "temporal_vae.")),
    ("Hunyuan video autoencoder", ("encoder.conv_in.conv.", "encoder.mid_block.", "quant_conv.")),
    (
        "2D autoencoder (AutoencoderKL)",
        ("encoder.down_blocks.0.", "decoder.up_blocks.0.", "quant_conv."),
    ),
    ("FLUX autoencoder", ("encoder.down.0.block.", "decoder.up.0.block.")),
    ("DC-AE", ("encoder.project_in.", "encoder.stages.0.", "decoder.project_out.")),
    ("T5 encoder", ("encoder.block.0.layer.0.SelfAttention.",)),
    ("CLIP text encoder", ("text_model.encoder.layers.0.",)),
)
"""Names of models with beginnings of tensor names that they alone have together. First fit wins."""


def recognise(shapes: Mapping[str, torch.Size]) -> str | None:
    """The known model that has these tensors, with its size where it can be read off.

    >>> recognise({"temporal_blocks.0.a": ..., "spatial_blocks.0.a": ..., "fps_embedder.a": ...})
    'STDiT3 (Open-Sora 1.2), depth 1'
    """
    for model, beginnings in KNOWN:
        for prefix in ("", "module.", "model."):
            if all(any(n.startswith(prefix + b) for n in shapes) for b in beginnings):
                where = f" below {prefix!r}" if prefix else ""
                return model + where + _size(shapes, prefix)
    return None


def _size(shapes: Mapping[str, torch.Size], prefix: str) -> str:
    blocks = re.compile(re.escape(prefix) + r"(?:spatial_blocks|blocks|double_blocks)\.(\d+)\.")
    depths = {int(match[1]) for name in shapes if (match := blocks.match(name))}
    text = f", depth {max(depths) + 1}" if depths else ""
    patches = shapes.get(f"{prefix}x_embedder.proj.weight")
    return text + (f", hidden size {patches[0]}" if patches else "")
