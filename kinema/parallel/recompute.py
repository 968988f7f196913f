"""Activation checkpointing, put on a finished model from outside."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kinema.config.errors import KinemaError

TRANSFORMER_BLOCKS = ("blocks.*", "spatial_blocks.*", "temporal_blocks.*")
"""Blocks of all transformers."""


def apply_recompute(
    model: nn.Module,
    patterns: Sequence[str] = TRANSFORMER_BLOCKS,
    *,
    kind: Literal["full", "selective"] = "full",
    every: int = 1,
) -> list[str]:
    """Keep only little of some modules for the backward pass, and run them again in it.

    Names in the state dict do not change, and copies of the model recompute for themselves.

    Args:
        model: changed in place.
        patterns: modules by name; `*` stands for one part of a dotted name.
        kind: "full" keeps a module's inputs; "selective" also what attention gave, what other ranks
            sent (sequence parallelism), and matrix products and convolutions whose result is no
            wider than what each of its elements is summed over: they cost most for the memory that
            they take.
        every: of the modules of a pattern, the first and each so-manyth after it.

    Returns:
        The names of the modules that recompute.

    Raises:
        KinemaError: no module has such a name.
    """
    found = modules_named(model, patterns, where="recompute")
    base = _Recomputed if kind == "full" else _PartlyRecomputed
    classes: dict[type, type] = {}
    chosen = []
    for pattern in patterns:
        named = [name for name in found if fits(name, pattern)]
        for name in named[::every]:
            module, cls = found[name], type(found[name])
            chosen.append(name)
            if not issubclass(cls, _Recomputed):
                # Another class rather than another `forward`, so that copies are whole.
                if cls not in classes:
                    classes[cls] = type(f"Recomputed{cls.__name__}", (base, cls), {})
                module.__class__ = classes[cls]
    return chosen


def modules_named(model: nn.Module, patterns: Sequence[str], *, where: str) -> dict[str, nn.Module]:
    """Modules by name whose name fits one of the patterns.

    Args:
        patterns: `*` stands for one part of a dotted name.
        where: who asks, for the error.

    Raises:
        KinemaError: there is none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if any(fits(name, p) for p in patterns)
    }
    if not found:
        raise KinemaError(
            f"no module of {type(model).__name__} is named {' or '.join(patterns)}",
            where=where,
            hint="name its blocks",
        )
    return found


class _Recomputed(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        # Nothing in a model draws random numbers, so there is no generator state to keep.
        return checkpoint(
            super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )


class _PartlyRecomputed(_Recomputed):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return checkpoint(
            # Past the class above, which would checkpoint as a whole.
            super(_Recomputed, self).forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, _kept),
            **kwargs,
        )


def _kept(_: Any, op: torch._ops.OpOverload, *args: Any, **__: Any) -> CheckpointPolicy:
    """Whether the result of an operation is kept for the backward pass."""
    name = op.name().partition(".")[0]
    keep = "attention" in name or "attn" in name or "all_to_all" in name
    if name in _PRODUCTS:
        factor = args[_PRODUCTS[name]]
        summed, width = factor.shape[-2:]
        keep = width <= summed
    elif name == "aten::convolution":
        weight = args[1]
        keep = len(weight) <= weight[0].numel()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_PRODUCTS = {"aten::mm": 1, "aten::addmm": 2, "aten::bmm": 1, "aten::baddbmm": 2}
"""Matrix products, and which argument is the second factor, `[..., summed, width]`."""


def fits(name: str, pattern: str) -> bool:
    """Whether a dotted name is a pattern's; `*` stands for one part."""
    return is_below(name, pattern) and name.count(".") == pattern.count(".")


def is_below(name: str, pattern: str) -> bool:
    """Whether a dotted name begins with a pattern, part by part; `*` stands for one part."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))
