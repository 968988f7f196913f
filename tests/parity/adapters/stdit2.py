"""STDiT2 of Open-Sora 1.1, and 1.2's copy of it: keys, forward, gradients."""

from __future__ import annotations

from typing import Any

import torch

from kinema.config.settings import from_dict
from kinema.models.config import STDiT2Config
from kinema.models.stdit2 import STDiT2
from tests.parity.adapters.dit import (
    check_forward,
    check_keys,
    freeze_as_asked,
    load_released,
)
from tests.parity.case import Case, adapter

NAMED_SIZES = {"XL_2": {"depth": 28, "hidden_size": 1152, "num_heads": 16}}
"""What the original's functions `STDiT2_<name>` stand for."""
ORIGINAL_DEFAULTS = {"input_sq_size": 32, "model_max_length": 120, "qk_norm": False}
NO_EFFECT = (
    "input_size",
    "drop_path",
    "freeze",
    "no_temporal_pos_emb",
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
)
"""Arguments of the original that change nothing in evaluation, and that our model does not have;
`freeze_as_asked` does what they say about training."""


def config_of(case: Case, **more: Any) -> STDiT2Config:
    plain = {name: value for name, value in case.config.items() if name not in NO_EFFECT}
    # 1.1 knows but one order of rotation and norm; 1.2 has a switch, which is off.
    legacy = {"qk_norm_legacy": case.official.startswith("v1.1 ")}
    return from_dict(STDiT2Config, ORIGINAL_DEFAULTS | legacy | plain | more)


@adapter(r" STDiT2_\w+$", kind="json")
def keys(case: Case) -> None:
    size = NAMED_SIZES[case.official.partition("STDiT2_")[2]]
    with torch.device("meta"):
        model = STDiT2(config_of(case, **size))
    check_keys(case, freeze_as_asked(model, case.config))


@adapter(r"opensora\.models\.stdit\.stdit2\.STDiT2\b", kind="safetensors")
def forward(case: Case) -> None:
    model = STDiT2(config_of(case)).eval()
    load_released(model, case.group("weight"))
    call = case.entry["call"]
    inputs = {name: case.input(name) for name in (*call["args"], *call["kwargs"])}
    check_forward(case, model, inputs)
