"""Gradients of a model that FSDP2 shards: each rank has the mean over ranks of its own part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kinema.parallel.shard import local, units_of

# The first is the newer name.
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class ShardedGradients:
    """See `Gradients`. FSDP2 averages; this says when, and finishes the step.

    With accumulation, gradients are reduce-scattered after every micro-batch, so that a rank never
    holds more of them than its own part: in float32 and whole they would take more memory than the
    weights that sharding freed. What crosses machines (hybrid) is sent once, with the last
    micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        group: dist.ProcessGroup,
        *,
        keep_weights: bool,
    ) -> None:
        """
        Args:
            model: sharded.
            parameters: those of it that train.
            group: the ranks that hold one copy together.
            keep_weights: gathered weights stay from one micro-batch of a step to the next.
        """
        assert isinstance(model, FSDPModule)
        self._model = model
        self._parameters = list(parameters.values())
        self._group = group
        self._keep_weights = keep_weights
        self._own: list[Tensor] = []
        for unit in units_of(model):
            unit.set_custom_reduce_scatter(_Noticed(self._own))  # type: ignore[arg-type]

    def zero(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def expect(self, *, last: bool) -> None:
        self._model.set_is_last_backward(last)
        self._model.set_requires_all_reduce(last)
        if self._keep_weights:
            self._model.set_reshard_after_backward(last)

    def finish(self) -> Tensor:
        for parameter in self._parameters:
            if parameter.grad is None:  # had no part in the loss
                parameter.grad = torch.zeros_like(parameter)
        if not self._own:  # nothing is sent in a world of one: all gradients are its own
            return self.norm()
        norm = torch.linalg.vector_norm(torch.stack(self._own))
        self._own.clear()
        return norm

    def norm(self) -> Tensor:
        norms = torch._foreach_norm(self._parts())
        squares = torch.stack(norms).square().sum()
        # Copies of the model hold the same gradients: over the ranks of one copy alone.
        dist.all_reduce(squares, group=self._group)
        return squares.sqrt()

    def scale(self, factor: Tensor | float) -> None:
        torch._foreach_mul_(self._parts(), factor)

    @torch.no_grad()  # DTensor hands out its part at once then: the GPU has nothing to do meanwhile
    def _parts(self) -> list[Tensor]:
        parts = []
        for parameter in self._parameters:
            assert isinstance(parameter.grad, DTensor)
            parts.append(local(parameter.grad))
        return parts


class _Noticed:
    """FSDP2's way of sending gradients, which notes the norm of what this rank brings: it tells
    which rank a non-finite gradient comes from."""

    def __init__(self, norms: list[Tensor]) -> None:
        self._norms = norms

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        self._norms.append(torch.linalg.vector_norm(input_tensor))
        return _REDUCE_SCATTER(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
