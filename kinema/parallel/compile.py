"""`torch.compile` for the blocks of a finished model, put on it from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch._dynamo
from torch import nn

from kinema.parallel.recompute import TRANSFORMER_BLOCKS, modules_named

MOST_VERSIONS = 64
"""Of a block: images and clips, one size and any size, texts of equal and of uneven lengths, with
and without gradients. PyTorch's own limit of 8 would leave some of them uncompiled."""


def compile_blocks(
    model: nn.Module,
    patterns: Sequence[str] = TRANSFORMER_BLOCKS,
    *,
    backend: str | Callable[..., Any] = "inductor",
) -> list[str]:
    """Compile each block by itself, in place, when it first runs.

    All blocks of a kind share what was compiled, so the wait does not grow with depth. A second
    size of input compiles once more, for sizes of any kind. Names in the state dict do not
    change. Recomputation (`apply_recompute`) comes before this.

    Args:
        model: changed in place.
        patterns: modules by name; `*` stands for one part of a dotted name.
        backend: of `torch.compile`.

    Returns:
        The names of the modules that will be compiled.

    Raises:
        KinemaError: no module has such a name.
    """
    blocks = modules_named(model, patterns, where="compile")
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MOST_VERSIONS)
    for block in blocks.values():
        block.compile(backend=backend)
    return list(blocks)
