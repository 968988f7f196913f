"""STDiT of Open-Sora 1.0, and with the frame masks that later repositories added: keys, forward,
gradients."""

from __future__ import annotations

from typing import Any

import torch

from kinema.config.settings import from_dict
from kinema.models.config import STDiTConfig
from kinema.models.stdit import STDiT
from tests.parity.adapters.dit import (
    check_forward,
    check_keys,
    freeze_as_asked,
    load_released,
)
from tests.parity.case import Case, adapter

NAMED_SIZES = {"XL_2": {"depth": 28, "hidden_size": 1152, "num_heads": 16}}
"""What the original's functions `STDiT_<name>` stand for."""
ORIGINAL_DEFAULTS = {"input_size": [1, 32, 32], "space_scale": 1.0, "model_max_length": 120}
NO_EFFECT = (
    "dtype",
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


def config_of(given: dict[str, Any], **more: Any) -> STDiTConfig:
    plain = {name: value for name, value in given.items() if name not in NO_EFFECT}
    return from_dict(STDiTConfig, ORIGINAL_DEFAULTS | plain | more)


@adapter(r" STDiT_\w+$", kind="json")
def keys(case: Case) -> None:
    size = NAMED_SIZES[case.official.partition("STDiT_")[2]]
    with torch.device("meta"):
        model = STDiT(config_of(case.config, **size))
    check_keys(case, freeze_as_asked(model, case.config))


@adapter(r"opensora\.models\.stdit\.stdit\.STDiT\b", kind="safetensors")
def forward(case: Case) -> None:
    model = STDiT(config_of(case.config)).eval()
    load_released(model, case.group("weight"))
    call = case.entry["call"]
    inputs = {name: case.input(name) for name in (*call["args"], *call["kwargs"])}
    check_forward(case, model, inputs)
