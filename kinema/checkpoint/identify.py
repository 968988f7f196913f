"""What a file of weights is: which network, of which size, in which form, and whether all fits.

Nothing but names and shapes is read. The settings of a network follow from its tensors; what leaves
no trace in them (number of heads without q/k norm, scale of positions) changes no name or shape.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from pydantic import ValidationError

from kinema.checkpoint.known import recognise
from kinema.checkpoint.layout import Fit, Layout, Stored, detect, match, wrapper_prefix
from kinema.checkpoint.released_names import layouts_of
from kinema.checkpoint.text_encoder_names import depth_of, text_encoder
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
    TransformerConfig,
    VAE2DConfig,
    VAEConfig,
    VAETemporalConfig,
    VideoVAEConfig,
)

Shapes = Mapping[str, torch.Size]
HEAD_DIM = 72
"""Of the released transformers; assumed where the file does not tell."""
TOLD = (
    "depth", "hidden_size", "mlp_ratio", "in_channels", "patch_size", "pred_sigma",
    "caption_channels", "model_max_length", "qk_norm", "size_conditions", "condition",
    "kv_compress",
    "vae_2d", "vae_temporal",
)  # fmt: skip
"""Settings that names and shapes tell of every network that has them."""
LAYOUTS = {
    "kinema": "the released names, which are Kinema's",
    "old names": "diffusers before 0.17",
    "first authors": "layout of the first authors (ldm)",
    "diffusers": "layout of diffusers",
    "transformers": "layout of transformers",
}


@dataclass(frozen=True)
class Identity:
    """What a file of weights is."""

    title: str
    config: TransformerConfig | VAEConfig | None
    """Settings of the network, as far as its tensors tell; None for text encoders."""
    layout: Layout
    fit: Fit
    parameters: int
    """Numbers in the file."""
    dtypes: dict[str, int]
    """Tensors by kind of number."""
    shapes: dict[str, torch.Size]
    """Of our network, by our names."""
    told: tuple[str, ...] = ()
    """Settings that the file tells beyond what every file tells: `input_size`, by its tables."""

    @property
    def fits(self) -> bool:
        computed = self.layout.computed
        strangers = [n for n in self.fit.unexpected if not _any_match(computed, n)]
        return not (self.fit.missing or strangers or self.fit.wrong_shape or self.fit.wrong_kind)

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Names that belong to nothing (position tables belong)."""
        return tuple(n for n in self.fit.unexpected if not _any_match(self.layout.computed, n))


def identify(
    shapes: Shapes, dtypes: Mapping[str, torch.dtype], config: Any = None
) -> Identity | None:
    """The network that these tensors are of; None if it is none that is known here.

    Args:
        config: settings of the network that they should be of, where that is known; the tensors
            are then compared with that one.
    """
    prefix = wrapper_prefix(shapes)
    plain = {n.removeprefix(prefix): s for n, s in shapes.items()}
    counts = dict(Counter(str(d).removeprefix("torch.") for d in dtypes.values()).most_common())
    numbers = sum(s.numel() for s in shapes.values())
    try:
        text = text_encoder(plain) if config is None else None
    except (KeyError, ValueError):
        return None  # half an encoder
    if text is not None:
        title, ours, computed = text
        layout = Layout("transformers", {n: Stored((n,)) for n in ours}, computed).prefixed(prefix)
        return Identity(title, None, layout, match(shapes, layout, ours), numbers, counts, ours)
    given = config is not None
    try:
        config = config if given else infer(plain)
        if config is None:
            return None
        with torch.device("meta"):
            module = (
                build_vae(config)
                if isinstance(config, (ImageVAEConfig, VideoVAEConfig))
                else build_transformer(config)
            )
    except (KeyError, IndexError, ValueError, ValidationError, ZeroDivisionError):
        return None  # half a model: its settings cannot be read off
    state = module.state_dict()
    ours = {n: t.shape for n, t in state.items()}
    layout = detect(shapes, layouts_of(config, ours))
    fit = match(shapes, layout, ours, dtypes, {n: t.dtype for n, t in state.items()})
    title = describe(config)
    if isinstance(config, DiTConfig) and config.num_classes is None and not given:
        title = title.replace("DiT", "DiT or Latte (the same tensors)", 1)
    told = ("input_size",) if "pos_embed" in plain or "pos_embed_spatial" in plain else ()
    return Identity(title, config, layout, fit, numbers, counts, ours, told)


def describe(config: TransformerConfig | VAEConfig) -> str:
    """One line: which network, how large."""
    names: dict[type, str] = {
        STDiT3Config: "STDiT3 (Open-Sora 1.2)",
        STDiT2Config: "STDiT2 (Open-Sora 1.1)",
        STDiTConfig: "STDiT (Open-Sora 1.0)",
        PixArtConfig: "PixArt",
        DiTConfig: "DiT",
        LatteConfig: "Latte",
        VideoVAEConfig: "video autoencoder (Open-Sora 1.2)",
        ImageVAEConfig: "image autoencoder (Stable Diffusion)",
    }
    name = names[type(config)]
    if isinstance(config, (VideoVAEConfig, ImageVAEConfig)):
        widths = "-".join(str(c) for c in config.vae_2d.block_out_channels)
        return f"{name}, widths {widths}, {config.latent_channels} latent channels"
    size = f"depth {config.depth}, hidden size {config.hidden_size}"
    if isinstance(config, PixArtConfig):
        kind = "alpha" if config.model_max_length <= 120 else "Sigma"
        name = f"PixArt-{kind}" + (" with size conditions" if config.size_conditions else "")
    if isinstance(config, (DiTConfig, LatteConfig)):
        size += (
            f", {config.num_classes} classes"
            if config.num_classes is not None
            else ", conditioned by captions"
        )
    else:
        size += f", {config.model_max_length} text tokens"
    return f"{name}, {size}"


def infer(shapes: Shapes) -> TransformerConfig | VAEConfig | None:
    """Settings of the network from its tensors (names without a wrapper's prefix).

    Raises:
        KeyError, ValueError: it is a known network, but tensors that would tell are missing.
    """
    if any(n.startswith("temporal_vae.") for n in shapes):
        return _video_vae(shapes)
    if "decoder.conv_in.weight" in shapes and "quant_conv.weight" in shapes:
        return _image_vae(shapes)
    if "spatial_blocks.0.attn.qkv.weight" in shapes:
        common = {**_common(shapes, "spatial_blocks"), **_caption(shapes)}
        return STDiT3Config(**{**common, **_rotary(shapes, "spatial_blocks")})
    if "blocks.0.attn_temp.qkv.weight" in shapes:
        common = {**_common(shapes, "blocks"), **_caption(shapes)}
        if "t_block_temp.1.weight" in shapes:
            return STDiT2Config(**{**common, **_rotary(shapes, "blocks")})
        return STDiTConfig(**common, **_tables(shapes, common))
    if "blocks.0.cross_attn.q_linear.weight" in shapes:
        return _pixart(shapes)
    if "blocks.0.adaLN_modulation.1.weight" in shapes:
        return _dit(shapes)
    if (
        "adaln_single.linear.weight" in shapes
        and "transformer_blocks.0.attn2.to_q.weight" in shapes
    ):
        if any(n.startswith("temporal_transformer_blocks") for n in shapes):
            return None  # Latte-1
        return _pixart(_like_ours(shapes))
    if "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight" in shapes:
        return _dit(_like_ours(shapes))
    return None


def unknown(shapes: Shapes) -> str:
    """What can be said of tensors that `identify` does not know."""
    guess = recognise(shapes)
    if guess is not None:
        return f"{guess}: this version has no such network, or half of it is missing"
    first = ", ".join(list(shapes)[:3])
    return f"no network that is known here ({len(shapes)} tensors: {first}, ...)"


def same_network(one: Any, other: Any, told: Collection[str] = ()) -> bool:
    """Whether two settings have the same tensors and differ in nothing that a file tells.

    Args:
        told: settings that usually leave no trace, and did in this file.
    """
    if type(one) is not type(other):
        return False
    names = {f.name for f in fields(one)} & {*TOLD, *told}
    for name in names:
        ours, theirs = (_without_groups(getattr(c, name)) for c in (one, other))
        if ours != theirs:
            return False
    return True


def _without_groups(value: Any) -> Any:
    """Settings without the number of groups of their norms, which leaves no trace."""
    if isinstance(value, VAE2DConfig):
        return replace(value, norm_num_groups=1)
    return replace(value, num_groups=1) if isinstance(value, VAETemporalConfig) else value


def _common(shapes: Shapes, blocks: str) -> dict[str, Any]:
    patches = shapes["x_embedder.proj.weight"]
    hidden, channels, *patch = patches
    patch = patch if len(patch) == 3 else [1, *patch]
    out = shapes["final_layer.linear.weight"][0] // math.prod(patch)
    return {
        "depth": depth_of(shapes, blocks),
        "hidden_size": hidden,
        "num_heads": max(1, hidden // HEAD_DIM) if hidden % HEAD_DIM == 0 else 1,
        "mlp_ratio": shapes[f"{blocks}.0.mlp.fc1.weight"][0] / hidden,
        "in_channels": channels,
        "patch_size": tuple(patch),
        "pred_sigma": out == 2 * channels,
    }


def _caption(shapes: Shapes) -> dict[str, Any]:
    return {
        "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
        "model_max_length": shapes["y_embedder.y_embedding"][0],
    }


def _rotary(shapes: Shapes, blocks: str) -> dict[str, Any]:
    """q/k norm, and the number of heads that rotation frequencies or norms give away."""
    found: dict[str, Any] = {"qk_norm": f"{blocks}.0.attn.q_norm.weight" in shapes}
    hidden = shapes["x_embedder.proj.weight"][0]
    found["num_heads"] = hidden // (2 * shapes["rope.freqs"][0])
    return found


def _tables(shapes: Shapes, common: Mapping[str, Any]) -> dict[str, Any]:
    """The latent size that position tables in the file are made for."""
    spatial = next((shapes[n] for n in ("pos_embed", "pos_embed_spatial") if n in shapes), None)
    if spatial is None or len(spatial) != 3:
        return {}
    side = math.isqrt(spatial[1])
    if side * side != spatial[1]:
        return {}
    times = next((shapes[n] for n in ("pos_embed_temporal", "temp_embed") if n in shapes), None)
    frames = times[1] if times is not None and len(times) == 3 else 1
    t, h, w = common["patch_size"]
    return {"input_size": (frames * t, side * h, side * w)}


def _pixart(shapes: Shapes) -> PixArtConfig:
    common = _common(shapes, "blocks")
    tables = _tables(shapes, common)
    # diffusers' files lack the learned empty caption: its length is then that of the kind.
    sized = "csize_embedder.mlp.0.weight" in shapes
    if "y_embedder.y_embedding" in shapes:
        caption = _caption(shapes)
    else:
        caption = {
            "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
            "model_max_length": 120 if sized else 300,
        }
    frames = shapes.get("pos_embed_temporal", torch.Size([1, 1, 0]))[1]
    norm = shapes.get("blocks.0.attn.q_norm.weight")
    if norm is not None:
        common["num_heads"] = common["hidden_size"] // norm[0]
    pooled = {
        int(m[1]): s for n, s in shapes.items() if (m := re.match(r"blocks\.(\d+)\.attn\.sr\.w", n))
    }
    compress = None
    if pooled:
        side = next(iter(pooled.values()))[2]
        compress = KVCompressConfig(scale_factor=side, kv_compress_layer=tuple(sorted(pooled)))
    return PixArtConfig(
        **common,
        kv_compress=compress,
        **caption,
        **tables,
        size_conditions=sized,
        qk_norm=norm is not None,
        no_temporal_pos_emb=frames == 1,
    )


def _dit(shapes: Shapes) -> DiTConfig | LatteConfig:
    """DiT and Latte have the same tensors; Latte's own files and 101 classes give it away."""
    common = _common(shapes, "blocks")
    tables = _tables(shapes, common)
    table = shapes.get("y_embedder.embedding_table.weight")
    condition: dict[str, Any] = {}
    if table is not None:
        condition["condition"] = f"label_{table[0] - 1}"
    else:
        condition["condition"] = "text"
        condition["caption_channels"] = _widest_input(shapes, "y_embedder")
    latte = "temp_embed" in shapes or condition["condition"] == "label_101"
    if latte:
        return LatteConfig(**common, **tables, **condition)
    frames = tables.get("input_size", (1, 0, 0))[0]
    return DiTConfig(**common, **tables, **condition, no_temporal_pos_emb=frames == 1)


def _widest_input(shapes: Shapes, layer: str) -> int:
    first = next(s for n, s in shapes.items() if n.startswith(layer) and len(s) == 2)
    return first[1]


def _like_ours(shapes: Shapes) -> dict[str, torch.Size]:
    """Of diffusers' transformers: the few tensors that settings are read off, by our names."""
    known = {
        "pos_embed.proj.weight": "x_embedder.proj.weight",
        "proj_out.weight": "final_layer.linear.weight",
        "proj_out_2.weight": "final_layer.linear.weight",
        "caption_projection.linear_1.weight": "y_embedder.y_proj.fc1.weight",
        "caption_projection.y_embedding": "y_embedder.y_embedding",
        "adaln_single.emb.resolution_embedder.linear_1.weight": "csize_embedder.mlp.0.weight",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight":
            "y_embedder.embedding_table.weight",
    }  # fmt: skip
    found = {ours: shapes[theirs] for theirs, ours in known.items() if theirs in shapes}
    for i in range(depth_of(shapes, "transformer_blocks")):
        found[f"blocks.{i}.mlp.fc1.weight"] = shapes[f"transformer_blocks.{i}.ff.net.0.proj.weight"]
    return found


def _vae_2d(shapes: Shapes) -> VAE2DConfig:
    """Of names without the video autoencoder's prefix; of diffusers, or of the first authors."""
    first = any(n.startswith("encoder.down.") for n in shapes)
    block = r"encoder\.down\.(\d+)\.block\.(\d+)\." if first else (
        r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\."
    )  # fmt: skip
    widths: dict[int, int] = {}
    layers = 0
    for name, shape in shapes.items():
        found = re.match(block + r"conv1\.weight", name)
        if found:
            widths[int(found[1])] = shape[0]
            layers = max(layers, int(found[2]) + 1)
    return VAE2DConfig(
        block_out_channels=tuple(widths[i] for i in range(len(widths))),
        layers_per_block=layers,
        latent_channels=shapes["post_quant_conv.weight"][0],
        # Groups leave no trace; any number that divides all widths has the same tensors.
        norm_num_groups=math.gcd(32, *widths.values()),
    )


def _image_vae(shapes: Shapes) -> ImageVAEConfig:
    return ImageVAEConfig(vae_2d=_vae_2d(shapes))


def _video_vae(shapes: Shapes) -> VideoVAEConfig:
    spatial = {
        n.removeprefix("spatial_vae.module."): s
        for n, s in shapes.items()
        if n.startswith("spatial_vae.module.")
    }
    return VideoVAEConfig(
        vae_2d=_vae_2d(spatial),
        vae_temporal=_temporal(shapes),
        shift=(0.0,) * shapes["shift"].numel(),
        scale=(1.0,) * shapes["scale"].numel(),
    )


def _temporal(shapes: Shapes) -> VAETemporalConfig:
    """Of `temporal_vae.encoder`: levels are blocks of residual blocks, with strided convolutions
    between them where frames are halved."""
    encoder = "temporal_vae.encoder."
    filters = shapes[f"{encoder}conv_in.conv.weight"][0]
    widths: dict[int, int] = {}
    depth = 0
    for name, shape in shapes.items():
        found = re.match(
            re.escape(encoder) + r"block_res_blocks\.(\d+)\.(\d+)\.conv1\.conv\.weight", name
        )
        if found:
            widths[int(found[1])] = shape[0]
            depth = max(depth, int(found[2]) + 1)
    halved = {
        int(m[1])
        for n in shapes
        if (m := re.match(re.escape(encoder) + r"conv_blocks\.(\d+)\.conv\.weight", n))
    }
    return VAETemporalConfig(
        filters=filters,
        channel_multipliers=tuple(widths[i] // filters for i in range(len(widths))),
        temporal_downsample=tuple(i in halved for i in range(len(widths) - 1)),
        num_res_blocks=depth,
        num_groups=math.gcd(32, filters),
        latent_embed_dim=shapes["temporal_vae.quant_conv.conv.weight"][1] // 2,
        embed_dim=shapes["temporal_vae.quant_conv.conv.weight"][0] // 2,
    )


def _any_match(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(p, name) for p in patterns)
