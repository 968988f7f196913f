"""Counts what makes the host wait for a GPU, without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
QUESTIONS = (
    aten._local_scalar_dense.default,  # item(), float(), bool()
    aten.nonzero.default,
    aten.equal.default,
)


class Questions(TorchDispatchMode):
    """Counts operators whose result the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.count += func in QUESTIONS
        return func(*args, **(kwargs or {}))
