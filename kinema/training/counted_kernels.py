"""Attention and autocast as a device does them, for counting memory where there is no device.

Tensors on the meta device have no autocast, and attention there writes all scores down. Both are
put back at the level of PyTorch's functions, by the lists of `ATen/autocast_mode.h` (2.11-2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

DeviceType = Literal["cuda", "cpu"]

LOWERED = frozenset(
    {
        F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.conv_transpose3d,
        torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
        torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__,
        torch.Tensor.mm, torch.Tensor.bmm,
    }
)  # fmt: skip
"""Functions that autocast runs in half precision on every device."""

RAISED_ON_CUDA = frozenset(
    {
        F.layer_norm, F.rms_norm, F.group_norm, F.softmax, F.log_softmax, F.mse_loss, F.l1_loss,
        F.softplus, torch.softmax, torch.exp, torch.log, torch.rsqrt, torch.pow, torch.cumsum,
        torch.Tensor.exp, torch.Tensor.log, torch.Tensor.rsqrt, torch.Tensor.pow,
        torch.Tensor.softmax, torch.Tensor.cumsum, torch.layer_norm, torch.rms_norm,
        torch.group_norm,
    }
)  # fmt: skip
"""Functions that autocast runs in float32 on CUDA, of those that the networks here call."""


class CountedKernels(TorchFunctionMode):
    """Runs attention by the fused kernel of a device, and casts as autocast does there.

    Weights that need gradients are cast once until `forget_casts`, as autocast does until its
    context ends; in the recomputation that follows they are cast where they are used.

    Args:
        device: whose kernels and lists.
        autocast: half precision that autocast runs in; None: it is off.
    """

    def __init__(self, device: DeviceType, autocast: torch.dtype | None) -> None:
        super().__init__()
        self._device = device
        self._lower = autocast
        self._casts: dict[int, Tensor] | None = {}

    def forget_casts(self) -> None:
        """The forward pass is over: cast weights are let go, and not kept again."""
        self._casts = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        attention = func is F.scaled_dot_product_attention
        if self._lower is not None:
            if attention or func in LOWERED:
                args, kwargs = self._cast(args, self._lower), self._cast(kwargs, self._lower)
            elif self._device == "cuda" and func in RAISED_ON_CUDA:
                args = self._cast(args, torch.float32)
                kwargs = self._cast(kwargs, torch.float32)
        if attention and args[0].is_meta:
            return self._attend(*args)
        return func(*args, **kwargs)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        """`[B, heads, L, D]`: result and row sums, no scores."""
        kernels = torch.ops.aten
        if self._device == "cpu":
            found = kernels._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        elif q.dtype is torch.float32:
            found = kernels._scaled_dot_product_efficient_attention(q, k, v, None, True)
        else:
            found = kernels._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)
        out = found[0]
        assert isinstance(out, Tensor)
        return out

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return self._cast_tensor(value, dtype)
        if isinstance(value, Mapping):
            return {key: self._cast(item, dtype) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(item, dtype) for item in value)
        return value

    def _cast_tensor(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        kept = self._casts is not None and value.is_leaf and value.requires_grad
        if not kept or dtype is torch.float32 or not torch.is_grad_enabled():
            return value.to(dtype)
        assert self._casts is not None
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]
