"""The mean of gradients over ranks, sent while the backward pass still runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinema.parallel.world import World

BUCKET_ELEMENTS = 8 * 2**20
"""Gradients sent at once: 32 MB of float32."""


class Gradients(Protocol):
    """The gradients of an optimizer step, averaged over ranks. Use per step::

        gradients.zero()
        for micro in range(accumulation):
            gradients.expect(last=micro == accumulation - 1)
            (loss / accumulation).backward()
        own_norm = gradients.finish()    # now p.grad is the mean over ranks

    A parameter without a part in the loss has a gradient of zero.
    """

    def zero(self) -> None:
        """Forget the last step's gradients."""
        ...

    def expect(self, *, last: bool) -> None:
        """Say whether the backward pass that follows is the step's last one on this rank."""
        ...

    def finish(self) -> Tensor:
        """Wait until every `p.grad` is the mean over ranks.

        Returns:
            Norm of this rank's own gradients before averaging, a scalar; not finite if any of
            them is not.
        """
        ...

    def norm(self) -> Tensor:
        """Norm of all gradients together, a scalar, the same on every rank. Collective."""
        ...

    def scale(self, factor: Tensor | float) -> None:
        """Multiply all gradients by `factor`."""
        ...


@dataclass
class _Bucket:
    flat: Tensor
    parameters: int
    missing: int = 0
    work: Any = field(default=None, repr=False)


class GradientMean:
    """Gradients of `parameters` as views into a few flat buffers that are averaged over ranks.

    For models that every rank holds whole; see `Gradients` for its use. Buffers have the same
    layout in every process and from the first step on, so that sums are formed in the same order
    whether or not a run was interrupted (DDP reorders its buckets after the first step).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        self._world = world
        self._buckets: list[_Bucket] = []
        self._norms: list[Tensor] = []
        self._launched = 0
        self._armed = False
        # Backward reaches the last parameters first: their bucket is ready first.
        group: list[nn.Parameter] = []
        for parameter in reversed(list(parameters)):
            full = sum(p.numel() for p in group) + parameter.numel() > BUCKET_ELEMENTS
            if group and (full or _kind(parameter) != _kind(group[0])):
                self._add_bucket(group)
                group = []
            group.append(parameter)
        if group:
            self._add_bucket(group)

    def _add_bucket(self, parameters: list[nn.Parameter]) -> None:
        first = parameters[0]
        flat = torch.zeros(
            sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device
        )
        index, offset = len(self._buckets), 0
        for parameter in parameters:
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
            if self._world.size > 1:
                parameter.register_post_accumulate_grad_hook(lambda _, i=index: self._ready(i))
        self._buckets.append(_Bucket(flat, len(parameters)))

    def zero(self) -> None:
        """Forget the last step's gradients."""
        for bucket in self._buckets:
            bucket.flat.zero_()

    def expect(self, *, last: bool) -> None:
        """Say whether the backward pass that follows is the step's last one on this rank."""
        self._armed = last
        for bucket in self._buckets:
            bucket.missing = bucket.parameters

    def _ready(self, index: int) -> None:
        if not self._armed:
            return
        self._buckets[index].missing -= 1
        # All ranks must send in the same order, whatever order their gradients come in.
        while self._launched < len(self._buckets) and not self._buckets[self._launched].missing:
            self._launch()

    def _launch(self) -> None:
        bucket = self._buckets[self._launched]
        self._launched += 1
        # Of this rank alone: tells which rank a non-finite gradient comes from.
        self._norms.append(torch.linalg.vector_norm(bucket.flat))
        if self._world.size > 1:
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)

    def finish(self) -> Tensor:
        """Send what is left, wait, and divide: every `p.grad` is the mean over ranks afterwards.

        Returns:
            Norm of this rank's own gradients before averaging, a scalar; not finite if any of
            them is not.
        """
        while self._launched < len(self._buckets):
            self._launch()
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
                bucket.work = None
            if self._world.size > 1:
                bucket.flat.div_(self._world.size)
        norm = torch.linalg.vector_norm(torch.stack(self._norms))
        self._norms.clear()
        self._launched = 0
        self._armed = False
        return norm

    def norm(self) -> Tensor:
        """Norm of all gradients together, a scalar."""
        norms = [torch.linalg.vector_norm(b.flat) for b in self._buckets]
        return torch.linalg.vector_norm(torch.stack(norms))

    def scale(self, factor: Tensor | float) -> None:
        """Multiply all gradients by `factor`."""
        for bucket in self._buckets:
            bucket.flat.mul_(factor)


def _kind(parameter: nn.Parameter) -> tuple[torch.dtype, torch.device]:
    return parameter.dtype, parameter.device
