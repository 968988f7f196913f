"""The forms in which the weights of each network are published.

Our names are those of the state dicts that Open-Sora writes. What differs elsewhere:

- *Files of the first authors* (Meta's DiT, Latte, PixArt): the patch embedding is a convolution
  over images, `[O, I, 2, 2]`, where Open-Sora has an axis for time; position tables are in the
  file, which are computed here.
- *Stable Diffusion's autoencoders*: early files call the layers of the attention `query`, `key`,
  `value`, `proj_attn`; the files of their first authors are laid out by levels (`down.0.block.0`)
  and have 1x1 convolutions where diffusers has linear layers.
- *diffusers*: queries, keys and values apart; DiT's timestep and class embeddings once per block.

The names of diffusers are known from its public conversion programs; diffusers itself was not run
against them. Latte has a class there (`LatteTransformer3DModel`) that is another network: Latte-1,
conditioned by T5 like PixArt; no Latte of ours fits into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kinema.checkpoint.layout import Layout, Stored
from kinema.models.config import (
    DiTConfig,
    ImageVAEConfig,
    LatteConfig,
    PixArtConfig,
    STDiTConfig,
    VideoVAEConfig,
)

PATCHES = "x_embedder.proj.weight"
TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal", "temp_embed")
"""Position tables, under every name that the originals gave them."""
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""An autoencoder's attention layers, and what diffusers called them before version 0.17."""
COMPUTED = (STDiTConfig, DiTConfig, LatteConfig, PixArtConfig)
"""Networks whose files may hold those tables."""


def layouts(module: nn.Module) -> tuple[Layout, ...]:
    """Every form in which weights for this network are known, our own first."""
    return layouts_of(
        getattr(module, "config", None), {n: t.shape for n, t in module.state_dict().items()}
    )


def layouts_of(config: Any, shapes: Mapping[str, torch.Size]) -> tuple[Layout, ...]:
    """`layouts` from a network's settings and the shapes of its tensors."""
    found = [own(config, shapes)]
    if isinstance(config, (ImageVAEConfig, VideoVAEConfig)):
        found.append(old_autoencoder(shapes))
    if isinstance(config, ImageVAEConfig):
        found.append(first_autoencoder(shapes))
    if isinstance(config, PixArtConfig) and pixart_fits_diffusers(config):
        found.append(diffusers_pixart(shapes))
    if isinstance(config, DiTConfig) and dit_fits_diffusers(config):
        found.append(diffusers_dit(config, shapes))
    return tuple(found)


def own(config: Any, shapes: Iterable[str]) -> Layout:
    """Our own names: also those of the files of the first authors."""
    stored = {n: Stored((n,)) for n in shapes}
    if isinstance(config, COMPUTED) and config.patch_size[0] == 1:
        stored[PATCHES] = Stored((PATCHES,), without=2, either=True)
    return Layout("kinema", stored, TABLES if isinstance(config, COMPUTED) else ())


def authors(config: Any, shapes: Iterable[str]) -> Layout:
    """As the first authors wrote it: patches without an axis of time."""
    stored = {n: Stored((n,)) for n in shapes}
    if from_images(config):
        stored[PATCHES] = Stored((PATCHES,), without=2)
    return Layout("original", stored, TABLES if isinstance(config, COMPUTED) else ())


def from_images(config: Any) -> bool:
    """Whether the network was released by its first authors, and not only by Open-Sora."""
    if isinstance(config, PixArtConfig):
        return config.patch_size[0] == 1 and config.no_temporal_pos_emb
    if isinstance(config, DiTConfig):
        return config.patch_size[0] == 1 and config.no_temporal_pos_emb and _labels(config)
    if isinstance(config, LatteConfig):
        return config.patch_size[0] == 1 and _labels(config)
    return False


def _labels(config: DiTConfig | LatteConfig) -> bool:
    return config.num_classes is not None


def old_autoencoder(shapes: Iterable[str]) -> Layout:
    """The attention's names before diffusers 0.17."""
    stored = {}
    for name in shapes:
        found = re.fullmatch(r"(.*attentions\.\d+\.)(to_q|to_k|to_v|to_out\.0)\.(\w+)", name)
        if found is None:
            stored[name] = Stored((name,))
            continue
        theirs = f"{found[1]}{OLD_ATTENTION[found[2]]}.{found[3]}"
        stored[name] = Stored((theirs,))
    return Layout("old names", stored)


def first_autoencoder(shapes: Iterable[str]) -> Layout:
    """Stable Diffusion's autoencoder as its first authors laid it out (`ldm`, `.ckpt` files)."""
    levels = 1 + max(
        (int(m[1]) for n in shapes if (m := re.search(r"encoder\.down_blocks\.(\d+)\.", n))),
        default=0,
    )
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }

    def theirs(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(  # counted from the other end
            r"up_blocks\.(\d+)\.resnets\.(\d+)",
            lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}",
            name,
        )
        name = re.sub(
            r"up_blocks\.(\d+)\.upsamplers\.0",
            lambda m: f"up.{levels - 1 - int(m[1])}.upsample",
            name,
        )
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(
            r"mid_block\.attentions\.0\.(group_norm|to_q|to_k|to_v|to_out\.0)",
            lambda m: f"mid.attn_1.{attention[m[1]]}",
            name,
        )
        return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")

    stored = {
        name: Stored(
            (theirs(name),),
            extra=2 if re.search(r"attentions\.0\.to_.*weight", name) else 0,
            either=True,
        )
        for name in shapes
    }
    return Layout("first authors", stored)


def pixart_fits_diffusers(config: PixArtConfig) -> bool:
    """Whether `PixArtTransformer2DModel` can express it."""
    return (
        not config.qk_norm
        and config.kv_compress is None
        and config.patch_size[0] == 1
        and config.no_temporal_pos_emb
    )


def dit_fits_diffusers(config: DiTConfig) -> bool:
    """Whether `DiTTransformer2DModel` can express it."""
    return config.patch_size[0] == 1 and config.no_temporal_pos_emb and _labels(config)


_PIXART = {
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
    "x_embedder.proj": "pos_embed.proj",
}
_PIXART_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_PIXART_WHOLE = {
    "final_layer.scale_shift_table": "scale_shift_table",
    # Older versions of diffusers have a buffer of this name; newer ones have no place for the
    # learned empty caption, and encode "" instead.
    "y_embedder.y_embedding": "caption_projection.y_embedding",
}


def diffusers_pixart(shapes: Iterable[str]) -> Layout:
    """`PixArtTransformer2DModel`."""
    stored = {}
    for name in shapes:
        layer, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
        if name in _PIXART_WHOLE:
            stored[name] = Stored((_PIXART_WHOLE[name],))
        elif leaf == "scale_shift_table":
            stored[name] = Stored((f"transformer_{name}",))
        elif block is not None:
            parts = tuple(
                f"transformer_blocks.{block[1]}.{part}.{leaf}" for part in _PIXART_BLOCK[block[2]]
            )
            stored[name] = Stored(parts)
        else:
            theirs = (f"{_PIXART[layer]}.{leaf}",)
            stored[name] = Stored(theirs, without=2 if name == PATCHES else None)
    return Layout("diffusers", stored, (r"pos_embed\.pos_embed",))


_DIT_BLOCK = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_DIT_EVERY_BLOCK = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_DIT = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def diffusers_dit(config: DiTConfig, shapes: Iterable[str]) -> Layout:
    """`DiTTransformer2DModel`."""
    stored = {}
    for name in shapes:
        layer, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
        if layer in _DIT_EVERY_BLOCK:
            first, *others = (
                f"transformer_blocks.{i}.{_DIT_EVERY_BLOCK[layer]}.{leaf}"
                for i in range(config.depth)
            )
            stored[name] = Stored((first,), copies=tuple(others))
        elif block is not None:
            stored[name] = Stored(
                tuple(f"transformer_blocks.{block[1]}.{p}.{leaf}" for p in _DIT_BLOCK[block[2]])
            )
        else:
            theirs = (f"{_DIT[layer]}.{leaf}",)
            stored[name] = Stored(theirs, without=2 if name == PATCHES else None)
    return Layout("diffusers", stored, (r"pos_embed\.pos_embed",))
