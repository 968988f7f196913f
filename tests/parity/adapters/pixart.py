"""PixArt-alpha and -Sigma as Open-Sora 1.0 and 1.2 run them: keys, forward, gradients."""

from __future__ import annotations

from typing import Any

import torch

from kinema.config.settings import from_dict
from kinema.models.build import build_transformer
from kinema.models.config import PixArtConfig
from tests.parity.adapters.dit import (
    check_forward,
    check_keys,
    freeze_as_asked,
    load_released,
)
from tests.parity.case import Case, adapter

XL = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": [1, 2, 2]}
NAMED_SIZES = {"XL_2": XL, "1B_2": XL | {"hidden_size": 1872, "num_heads": 26}}
"""What the original's functions `PixArt_<name>` stand for."""
NO_EFFECT = (
    "dtype",
    "drop_path",
    "freeze",
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
)
"""Arguments of the original that change nothing in evaluation, and that our model does not have;
`freeze_as_asked` does what they say about training."""
ORIGINAL_DEFAULTS = {"input_size": [1, 32, 32], "no_temporal_pos_emb": False}


def config_of(kind: str, given: dict[str, Any]) -> PixArtConfig:
    plain = ORIGINAL_DEFAULTS | {k: v for k, v in given.items() if k not in NO_EFFECT}
    compress = plain.pop("kv_compress_config", None)
    if compress is not None and compress["scale_factor"] > 1:
        depth = plain.get("depth", PixArtConfig().depth)
        layers = [i for i in compress["kv_compress_layer"] if i < depth]
        plain["kv_compress"] = compress | {"kv_compress_layer": layers} if layers else None
    return from_dict(PixArtConfig, plain | {"size_conditions": kind == "PixArtMS"})


@adapter(r" (PixArt|PixArtMS|PixArt_Sigma)_(XL|1B)_\w+$", kind="json")
def keys(case: Case) -> None:
    kind, size, patch = case.official.split()[-1].rsplit("_", 2)
    with torch.device("meta"):
        model = build_transformer(config_of(kind, case.config | NAMED_SIZES[f"{size}_{patch}"]))
    check_keys(case, freeze_as_asked(model, case.config))


@adapter(r"opensora\.models\.pixart\.", kind="safetensors")
def forward(case: Case) -> None:
    model = build_transformer(config_of(case.official.rpartition(".")[2], case.config)).eval()
    load_released(model, case.group("weight"))
    call = case.entry["call"]
    names = {*call["args"], *call["kwargs"]}
    if "data_info" in names:
        names = (names - {"data_info"}) | {"hw", "ar"}
    check_forward(case, model, {name: case.input(name) for name in names})
