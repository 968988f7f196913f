"""DiT and Latte of Open-Sora 1.0 and 1.2: keys, forward, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kinema.config.settings import from_dict
from kinema.models.build import build_transformer
from kinema.models.config import DiTConfig, LatteConfig
from kinema.models.transformer import Transformer
from kinema.parallel.recompute import is_below
from kinema.training.parts import freeze
from tests.parity.case import Case, adapter

NAMED_SIZES = {
    "XL_2": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": [1, 2, 2]},
    "XL_2x2": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": [2, 2, 2]},
}
"""What the original's functions `DiT_<name>` and `Latte_<name>` stand for."""
NO_EFFECT = (
    "dtype",
    "model_max_length",
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
)
"""Arguments of the original that change nothing in evaluation, and that ours does not have."""
ORIGINAL_DEFAULTS = {"input_size": [16, 32, 32], "condition": "text"}


def config_of(kind: str, given: dict[str, Any]) -> DiTConfig | LatteConfig:
    plain = ORIGINAL_DEFAULTS | {k: v for k, v in given.items() if k not in NO_EFFECT}
    plain["pred_sigma"] = plain.pop("learn_sigma", True)
    in_time = plain.pop("no_temporal_pos_emb", False)
    if kind == "Latte":  # takes the argument, and adds positions all the same
        return from_dict(LatteConfig, plain)
    return from_dict(DiTConfig, plain | {"no_temporal_pos_emb": in_time})


def freeze_as_asked(model: Transformer, given: dict[str, Any]) -> Transformer:
    """What the originals' constructors freeze, by means of a recipe's `freeze`."""
    kept: tuple[str, ...] = ()
    if given.get("freeze") == "text":
        freeze(model, ["blocks.*.cross_attn"])
    elif given.get("freeze") == "not_temporal":
        kept = ("blocks.*.attn_temp",)
    elif given.get("only_train_temporal"):
        kept = ("temporal_blocks",)
    else:
        assert given.get("freeze") is None
    if kept:
        names = [n for n, _ in model.named_parameters()]
        freeze(model, [n for n in names if not any(is_below(n, part) for part in kept)])
    return model


@adapter(r" (DiT|Latte)_XL_\w+$", kind="json")
def keys(case: Case) -> None:
    kind, _, size = case.official.split()[-1].partition("_")
    with torch.device("meta"):
        model = build_transformer(config_of(kind, case.config | NAMED_SIZES[size]))
    check_keys(case, model)


@adapter(r"opensora\.models\.(dit\.dit\.DiT|latte\.latte\.Latte)$", kind="safetensors")
def forward(case: Case) -> None:
    model = build_transformer(config_of(case.official.rpartition(".")[2], case.config)).eval()
    load_released(model, case.group("weight"))
    call = case.entry["call"]
    inputs = {name: case.input(name) for name in (*call["args"], *call["kwargs"])}
    check_forward(case, model, inputs)


def check_keys(case: Case, model: Transformer) -> None:
    """Names, shapes, dtypes and kinds against a table; tables of positions are buffers there."""
    table = case.table()
    kinds = {
        name: "param" if p.requires_grad else "param, never trained"
        for name, p in model.named_parameters()
    }
    state = model.state_dict()
    state |= {name: t.to("meta") for name, t in model.recomputed_tensors().items()}
    ours = {
        name: [list(t.shape), str(t.dtype).removeprefix("torch."), kinds.get(name, "buffer")]
        for name, t in state.items()
    }
    assert ours == table["keys"]
    assert sum(p.numel() for p in model.parameters()) == table["num_parameters"]


def load_released(model: Transformer, weights: dict[str, Tensor]) -> None:
    """Load strictly what the model has, and compare what it computes itself."""
    computed = model.recomputed_tensors()
    for name, want in computed.items():
        if name in weights:
            torch.testing.assert_close(weights[name], want, atol=1e-6, rtol=0)
    rest = {name: t for name, t in weights.items() if name not in computed}
    model.load_state_dict(rest, strict=True)


def check_forward(case: Case, model: Transformer, inputs: dict[str, Tensor]) -> None:
    """`out.x` and all gradients of a case; `inputs` are the model's arguments by name."""
    gradients = case.group("grad")
    for name in gradients:
        if name.startswith("in."):
            inputs[name.removeprefix("in.")].requires_grad_()
    out = model(**inputs)
    assert out.dtype == torch.float32
    case.check("out.x", out)
    if gradients:
        (out * case.input("R")).sum().backward()
    for name in gradients:
        of_input = name.startswith("in.")
        tensor = inputs[name.removeprefix("in.")] if of_input else model.get_parameter(name)
        assert tensor.grad is not None
        case.check(f"grad.{name}", tensor.grad)
