"""Names and shapes of the tensors of T5's and CLIP's text encoders, as transformers writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

Shapes = Mapping[str, torch.Size]


def depth_of(shapes: Shapes, blocks: str) -> int:
    """How many numbered blocks there are below a name."""
    numbers = (m[1] for n in shapes if (m := re.match(rf"{re.escape(blocks)}\.(\d+)\.", n)))
    return 1 + max(int(n) for n in numbers)


def text_encoder(shapes: Shapes) -> tuple[str, dict[str, torch.Size], tuple[str, ...]] | None:
    """Title, tensors and what else may be there, of T5's and CLIP's text encoders.

    Raises:
        KeyError, ValueError: it is one of them, but tensors that tell its size are missing.
    """
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in shapes:
        return _t5(shapes)
    if "text_model.encoder.layers.0.self_attn.q_proj.weight" in shapes:
        return _clip(shapes)
    return None


def _t5(shapes: Shapes) -> tuple[str, dict[str, torch.Size], tuple[str, ...]]:
    depth = depth_of(shapes, "encoder.block")
    inner, width = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"]
    words = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
    up = ("wi_0", "wi_1") if gated else ("wi",)
    hidden = shapes[f"encoder.block.0.layer.1.DenseReluDense.{up[0]}.weight"][0]
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ours = {
        words: torch.Size([shapes[words][0], width]),
        bias: shapes.get(bias, torch.Size([32, inner // 64])),
        "encoder.final_layer_norm.weight": torch.Size([width]),
    }
    for i in range(depth):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for part in "qkv":
            ours[f"{attention}.SelfAttention.{part}.weight"] = torch.Size([inner, width])
        ours[f"{attention}.SelfAttention.o.weight"] = torch.Size([width, inner])
        ours[f"{attention}.layer_norm.weight"] = torch.Size([width])
        for part in up:
            ours[f"{mlp}.DenseReluDense.{part}.weight"] = torch.Size([hidden, width])
        ours[f"{mlp}.DenseReluDense.wo.weight"] = torch.Size([width, hidden])
        ours[f"{mlp}.layer_norm.weight"] = torch.Size([width])
    title = f"T5 {'v1.1 ' if gated else ''}text encoder, {depth} layers, width {width}"
    extra = (
        r"decoder\..*",
        r"lm_head\.weight",
        r"(encoder\.)?embed_tokens\.weight",
        "shared.weight",
    )
    return title, ours, extra


def _clip(shapes: Shapes) -> tuple[str, dict[str, torch.Size], tuple[str, ...]]:
    layers = "text_model.encoder.layers"
    depth = depth_of(shapes, layers)
    width = shapes[f"{layers}.0.self_attn.q_proj.weight"][0]
    hidden = shapes[f"{layers}.0.mlp.fc1.weight"][0]
    words, places = (f"text_model.embeddings.{n}_embedding.weight" for n in ("token", "position"))
    ours = {
        words: torch.Size([shapes[words][0], width]),
        places: torch.Size([shapes[places][0], width]),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        ours[f"{name}.weight"], ours[f"{name}.bias"] = (
            torch.Size([rows, columns]),
            torch.Size([rows]),
        )

    def norm(name: str) -> None:
        ours[f"{name}.weight"] = ours[f"{name}.bias"] = torch.Size([width])

    for i in range(depth):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layers}.{i}.self_attn.{part}", width, width)
        linear(f"{layers}.{i}.mlp.fc1", hidden, width)
        linear(f"{layers}.{i}.mlp.fc2", width, hidden)
        norm(f"{layers}.{i}.layer_norm1")
        norm(f"{layers}.{i}.layer_norm2")
    norm("text_model.final_layer_norm")
    extra = (r"vision_model\..*", r"(visual|text)_projection\.weight", "logit_scale",
             r"text_model\.embeddings\.position_ids")  # fmt: skip
    return f"CLIP text encoder, {depth} layers, width {width}", ours, extra
