"""Activation checkpointing, put on a finished model from outside."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kinema.config.errors import KinemaError

TRANSFORMER_BLOCKS = ("blocks.*", "spatial_blocks.*", "temporal_blocks.*")
"""Blocks of all transformers."""


def apply_recompute(model: nn.Module, patterns: Sequence[str] = TRANSFORMER_BLOCKS) -> list[str]:
    """Keep only the inputs of some modules for the backward pass, and run those again in it.

    Names in the state dict do not change, and copies of the model recompute for themselves.

    Args:
        model: changed in place.
        patterns: modules by name; `*` stands for one part of a dotted name.

    Returns:
        The names of the modules that recompute.

    Raises:
        KinemaError: no module has such a name.
    """
    chosen = modules_named(model, patterns, where="recompute")
    classes: dict[type, type] = {}
    for module in chosen.values():
        cls = type(module)
        if not issubclass(cls, _Recomputed):
            # Another class rather than another `forward`, so that copies are whole.
            if cls not in classes:
                classes[cls] = type(f"Recomputed{cls.__name__}", (_Recomputed, cls), {})
            module.__class__ = classes[cls]
    return list(chosen)


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
        if any(is_below(name, p) and name.count(".") == p.count(".") for p in patterns)
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


def is_below(name: str, pattern: str) -> bool:
    """Whether a dotted name begins with a pattern, part by part; `*` stands for one part."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))
