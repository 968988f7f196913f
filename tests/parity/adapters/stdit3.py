"""STDiT3 of Open-Sora 1.2: keys, forward, gradients, and the layers by themselves."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from kinema.config.settings import from_dict
from kinema.models.attention import Packing, attend
from kinema.models.config import STDiT3Config
from kinema.models.embedding import (
    PatchEmbed3D,
    RotaryEmbedding,
    ScalarEmbedder,
    position_embedding,
    rotate,
    sinusoids,
)
from kinema.models.layers import CaptionEmbedder, CrossAttention, FinalLayer, RMSNorm, SelfAttention
from kinema.models.stdit3 import STDiT3, STDiT3Block
from tests.parity.adapters.dit import (
    check_forward,
    check_keys,
    freeze_as_asked,
    load_released,
)
from tests.parity.case import Case, adapter

NAMED_SIZES = {
    "XL_2": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "3B_2": {"depth": 28, "hidden_size": 1872, "num_heads": 26},
}
"""What the original's functions `STDiT3_<name>` stand for."""
NO_EFFECT = (
    "input_size",
    "drop_path",
    "enable_flash_attn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
    "only_train_temporal",
)
"""Arguments of the original that change nothing in evaluation, and that our model does not have;
`freeze_as_asked` does what they say about training."""


def config_of(given: dict[str, Any], **more: Any) -> STDiT3Config:
    plain = {name: value for name, value in given.items() if name not in NO_EFFECT}
    return from_dict(STDiT3Config, plain | more)


@adapter(r" STDiT3_\w+$", kind="json")
def keys(case: Case) -> None:
    size = NAMED_SIZES[case.official.partition("STDiT3_")[2]]
    with torch.device("meta"):
        model = STDiT3(config_of(case.config, **size))
    check_keys(case, freeze_as_asked(model, case.config))


@adapter(r"\bopensora\.models\.stdit\.stdit3\.STDiT3", kind="safetensors")
def forward(case: Case) -> None:
    # Only the notes say which case ran in bf16; only the shape, which came with packed text.
    half = "bfloat16" in case.entry.get("notes", "")
    packed = {"skip_y_embedder": True} if case.input("y").ndim == 3 else {}
    model = STDiT3(config_of(case.config, **packed)).eval()
    load_released(model, case.group("weight"))
    call = case.entry["call"]
    inputs = {name: case.input(name) for name in (*call["args"], *call["kwargs"])}
    if half:
        model = model.to(torch.bfloat16)
        # The original rounded what it was given, timesteps too. Ours does not, so round it here.
        inputs = {
            name: x.bfloat16().float() if x.is_floating_point() else x for name, x in inputs.items()
        }
    check_forward(case, model, inputs)


def _loaded(module: nn.Module, case: Case, prefix: str) -> Any:
    module.load_state_dict(case.group(f"weight.{prefix}"), strict=True)
    return module.eval()


@adapter(r"v1\.2 opensora\.models\.layers\.blocks", kind="safetensors")
@torch.no_grad()
def components(case: Case) -> None:
    dim = case.config["hidden"]
    _embeddings(case, dim)
    _attention(case, dim)
    _final_layer(case, dim)
    _block(case, dim)


def _embeddings(case: Case, dim: int) -> None:
    for name in case.group("out"):
        if name.startswith("timestep_embedding_"):
            channels = int(name.rpartition("_")[2])
            case.check(f"out.{name}", sinusoids(case.input("t"), channels))
    for i, (rows, columns, scale, base) in enumerate(case.config["pos2d_grid"]):
        got = position_embedding(dim, rows, columns, scale=torch.tensor(scale), base_size=base)
        case.check(f"out.pos2d.{i}", got[None])

    weight = case.tensors["weight.patch.proj.weight"]
    frames, rows, columns = weight.shape[2:]
    patch = PatchEmbed3D((frames, rows, columns), weight.shape[1], dim)
    _loaded(patch, case, "patch")
    case.check("out.patch", patch(case.input("patch")).flatten(1, 2))

    size, sizes = _loaded(ScalarEmbedder(dim), case, "size"), case.input("size")
    case.check("out.size", size(sizes.flatten()).view(sizes.shape[0], -1))
    first = size(sizes[:1].flatten()).view(1, -1)
    case.check("out.size_repeat", first.expand(sizes.shape[0], -1))

    length, channels = case.tensors["weight.caption.y_embedding"].shape
    caption = _loaded(CaptionEmbedder(channels, dim, length), case, "caption")
    y, drop = case.input("caption"), case.input("caption_drop_ids") == 1
    case.check("out.caption", caption(y))
    case.check("out.caption_drop", caption(caption.drop(y, drop)))


def _attention(case: Case, dim: int) -> None:
    head = case.config["rope_dim"]
    rope = _loaded(RotaryEmbedding(head), case, "rope")
    q = case.input("rope_q").transpose(1, 2)  # ours: [B, L, heads, D]
    case.check("out.rope_q", rotate(q, rope(q.shape[1])).transpose(1, 2))

    norm = RMSNorm(dim)
    norm.load_state_dict({"weight": case.tensors["weight.rms"]})
    case.check("out.rms", norm(case.input("rms")))
    case.check("out.rms_tiny", norm(case.input("tiny")))

    attention = _loaded(SelfAttention(dim, dim // head, qk_norm=True), case, "attn")
    x = case.input("attn")
    rotation = rope(x.shape[1])
    case.check("out.attn", attention(x, rotation))
    # The order of 1.1, of the same parts: rotated first, then normalised.
    q, k, v = attention.qkv(x).unflatten(-1, (3, -1, head)).unbind(2)
    q, k = attention.q_norm(rotate(q, rotation)), attention.k_norm(rotate(k, rotation))
    legacy = attention.proj(attend(q, k, v, backend="auto").flatten(2))
    case.check("out.attn_qk_norm_legacy", legacy)

    cross = _loaded(CrossAttention(dim, dim // head), case, "cross")
    packing = Packing.of(case.input("cross_lens").tolist(), torch.device("cpu"))
    got = cross(case.input("cross_x"), case.input("cross_y").squeeze(0), packing)
    case.check("out.cross", got)


def _final_layer(case: Case, dim: int) -> None:
    # Elements of a patch and channels only count together here.
    outputs = case.tensors["weight.final.linear.weight"].shape[0]
    final = _loaded(FinalLayer(dim, 1, outputs), case, "final")
    x, t, t0, mask = (case.input(f"final_{name}") for name in ("x", "t", "t0", "x_mask"))
    by_frame = x.unflatten(1, (mask.shape[1], -1))
    case.check("out.final_nomask", final(by_frame, t).flatten(1, 2))
    case.check("out.final_mask", final(by_frame, t, t0, mask).flatten(1, 2))
    tiny = case.input("tiny")
    case.check("out.final_tiny", final(tiny[:, None], t).squeeze(1))


def _block(case: Case, dim: int) -> None:
    head = case.config["rope_dim"]
    mlp_ratio = case.tensors["weight.block.mlp.fc1.bias"].numel() / dim
    config = STDiT3Config(hidden_size=dim, num_heads=dim // head, mlp_ratio=mlp_ratio)
    block = _loaded(STDiT3Block(config, temporal=True), case, "block")
    rotation_of = _loaded(RotaryEmbedding(head), case, "rope")
    x, text, mask = (
        case.input("block_x"),
        case.input("block_y").squeeze(0),
        case.input("block_x_mask"),
    )
    t, t0 = case.input("block_t")[:, None], case.input("block_t0")[:, None]
    x = x.unflatten(1, (mask.shape[1], -1))
    # Lengths of the texts are told in words only.
    lengths = re.search(r"text lengths \[([\d, ]+)\]", case.entry["notes"])
    assert lengths is not None
    packing = Packing.of([int(n) for n in lengths[1].split(",")], torch.device("cpu"))
    rotation = rotation_of(x.shape[1])
    got = block(x, text, packing, t, rotation)
    case.check("out.block_tiny", got.flatten(1, 2))
    got = block(x, text, packing, torch.where(mask[:, :, None], t, t0), rotation)
    case.check("out.block_tiny_mask", got.flatten(1, 2))
