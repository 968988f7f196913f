"""How many bytes of tensors a piece of PyTorch code has alive at once, found without computing.

On the meta device tensors have shapes and no memory, so the real forward of a network of any size
runs in a moment and allocates nothing; what it would allocate is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATION = 512
"""Bytes: PyTorch's CUDA allocator hands out multiples of this."""


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors made inside it on the meta device while they live.

    Views and results written in place share their memory with what was there and add nothing.

    Attributes:
        now: bytes alive.
        peak: most bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in _tensors(result):
            if value.is_meta:
                self._add(value.untyped_storage(), args)
        return result

    def _add(self, storage: torch.UntypedStorage, args: Sequence[Any]) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        for given in _tensors(args):
            # What came in from outside (weights, inputs) was there before; views of it are free.
            if given.untyped_storage()._cdata == key:
                return
        size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors in arguments or results, which operators nest one deep."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it: memory for the result and the row sums, no scores.

    On the meta device PyTorch would take the formula that writes all scores down, which no device
    that generates videos does. Catches every door at its last step, the ones in other libraries'
    text encoders as well.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = _qkv(*args, **kwargs)
            sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
            # The result stands as [B, L, heads, D] in memory, as the fused kernels leave it.
            shape = (*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1])
            del sums, k
            return q.new_empty(shape).transpose(-3, -2)
        return func(*args, **kwargs)


def _qkv(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    return query, key, value


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that `call` has alive at once, its result included, beside what it is given.

    Args:
        call: runs networks whose weights and inputs are on the meta device. Tensors on the CPU
            (masks, lengths) are computed for real and not counted.
    """
    with torch.no_grad(), FusedAttention(), LiveBytes() as live:
        result = call()
    peak = live.peak
    del result
    return peak
