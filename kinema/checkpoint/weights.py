"""Weights in and out of a module: strict, streamed, with every tensor accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor; `str()` is one line for the log."""

    source: str
    loaded: tuple[str, ...]
    new: tuple[str, ...]
    """In the module, not in the file: keep their initial values (declared by `allow_new`)."""
    unexpected: tuple[str, ...]
    """In the file, not in the module: left out (declared by `allow_unexpected`)."""
    loaded_parameters: int
    new_parameters: int
    unexpected_parameters: int


def load_weights(
    module: nn.Module,
    path: str | Path,
    *,
    allow_new: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    rename: Callable[[str], str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Fill `module` from a file or folder of weights, one tensor at a time.

    A module on the meta device gets its tensors as they are read (build it there: no memory, no
    random initialisation); a module with memory is copied into.

    Args:
        path: a `.safetensors` file, its `.index.json`, a `.pth`/`.pt`/`.bin` file of tensors, or a
            folder that holds weights under one of the usual names.
        allow_new: regular expressions (whole name) of tensors that the file may lack.
        allow_unexpected: regular expressions of tensors in the file that the module may lack.
        rename: from a name in the file to the name in the module.
        dtype: of floating-point tensors put into a meta module. None: as the module declares.
        device: where tensors put into a meta module go. None: the CPU.

    Raises:
        WeightsError: a missing or unreadable file; names or shapes that do not match (counts, the
            first few, and which known model the file looks like).
    """
    raise NotImplementedError


def iterate_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a weights file or folder by name, on the CPU, one at a time."""
    raise NotImplementedError


def save_weights(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 8 * 2**30,
) -> dict[str, Any]:
    """Write tensors as safetensors, whole or not at all: temporary name, fsync, rename."""
    raise NotImplementedError
