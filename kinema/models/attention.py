"""The one door to attention: dense, and from many queries to packed text of uneven lengths.

The kernel follows from the configured backend, the device, the dtype and the width of a head,
never from the rest of an input's shape, and is written to the log once (`attention_kernels`). A
parallel plan swaps these functions on the modules that hold them; their bodies stay as they are.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kinema.models.attention_kernels import HALF, attend_dense, attend_ragged_flash3, choose
from kinema.models.config import AttentionBackend

log = logging.getLogger(__name__)

MAX_ROWS = 65535
"""Fused CUDA kernels put the batch on a grid axis, which holds no more; also split elsewhere."""


class Attend(Protocol):
    """Signature of the dense door (`attend`)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, backend: AttentionBackend) -> Tensor: ...


class AttendPacked(Protocol):
    """Signature of the door to packed keys (`attend_packed`)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, backend: AttentionBackend
    ) -> Tensor: ...


def attend(q: Tensor, k: Tensor, v: Tensor, *, backend: AttentionBackend) -> Tensor:
    """Softmax attention without mask; scores are scaled by one over the root of `D`.

    Args:
        q: queries `[B, L, heads, D]`; any strides.
        k, v: keys and values `[B, M, heads, D]` of the same dtype.

    Returns:
        `[B, L, heads, D]`.

    Raises:
        KinemaError: the configured backend cannot run on this device and dtype.
    """
    kernel = _dense_kernel(backend, q.device, q.dtype, q.shape[-1])
    if q.shape[0] > MAX_ROWS:
        parts = zip(q.split(MAX_ROWS), k.split(MAX_ROWS), v.split(MAX_ROWS), strict=True)
        return torch.cat([attend_dense(*part, kernel) for part in parts])
    return attend_dense(q, k, v, kernel)


@dataclass(frozen=True)
class EqualRows:
    """The rows of a batch that have the same number of keys."""

    length: int
    rows: Tensor
    """Indices into the batch, `[R]`."""
    keys: Tensor
    """Indices into the packed keys, `[R * length]`."""


@dataclass(frozen=True)
class Packing:
    """Where the keys of each row of a batch stand in one packed sequence, row after row.

    Made once per forward pass (or once for all steps), outside of the blocks that share it.
    """

    lengths: tuple[int, ...]
    """Number of keys of each row."""
    longest: int
    starts: Tensor
    """First key of each row, and the end: `[B + 1]`, int32, where keys and queries are."""
    groups: tuple[EqualRows, ...]
    """Rows that have keys, by length; none if all rows have equally many."""
    order: Tensor
    """Where each row's result stands among those of the groups' rows, followed by the rows without
    keys: `[B]`; empty without groups."""
    without_keys: int
    """Number of rows that have no keys."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Rows with that many keys each, whose keys and queries are on `device`."""
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        rows_by_length: defaultdict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(lengths):
            rows_by_length[length].append(row)
        empty = rows_by_length.pop(0, [])
        groups: list[EqualRows] = []
        order = torch.empty(0, dtype=torch.long)
        if len(rows_by_length) > 1 or empty:
            indices = [torch.tensor([*itertools.chain(*rows_by_length.values()), *empty]).argsort()]
            for length, rows in rows_by_length.items():
                keys = (starts[rows, None] + torch.arange(length)).flatten()
                indices += [torch.tensor(rows), keys]
            # All in one copy to the device.
            moved = _move(torch.cat(indices), device).split([len(i) for i in indices])
            order = moved[0]
            groups = [
                EqualRows(*parts)
                for parts in zip(rows_by_length, moved[1::2], moved[2::2], strict=True)
            ]
        starts = _move(starts, device)
        return cls(tuple(lengths), max(lengths), starts, tuple(groups), order, len(empty))


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, backend: AttentionBackend
) -> Tensor:
    """Attention in which each row of the batch sees its own keys, and no work is done for padding.

    On CUDA in half precision one kernel takes all rows ("flash3", "flash", and so "auto");
    otherwise rows of equal length run together. A row without keys gets zeros.

    Args:
        q: queries `[B, L, heads, D]`.
        k, v: keys and values of all rows, `[sum of lengths, heads, D]`.
        packing: which keys belong to which row.

    Returns:
        `[B, L, heads, D]`.

    Raises:
        KinemaError: the configured backend cannot run on this device and dtype.
    """
    kernel = _packed_kernel(backend, q.device, q.dtype, q.shape[-1])
    if kernel in ("flash3", "varlen"):
        return _attend_in_one(q, k, v, packing, kernel)
    return _attend_by_length(q, k, v, packing, kernel)


PackedKernel = AttentionBackend | Literal["varlen"]
"""As `choose` gives it; "varlen" is PyTorch's kernel for rows of uneven lengths."""


def _attend_in_one(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, kernel: PackedKernel
) -> Tensor:
    rows, length = q.shape[:2]
    starts = torch.arange(rows + 1, device=q.device, dtype=torch.int32) * length
    given = q.flatten(0, 1), k, v, starts, packing.starts, length, packing.longest
    if kernel == "flash3":
        return attend_ragged_flash3(*given).unflatten(0, (rows, length))
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(*given)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (rows, length))


def _attend_by_length(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, kernel: AttentionBackend
) -> Tensor:
    if packing.longest and not packing.groups:
        k, v = (x.unflatten(0, (-1, packing.longest)) for x in (k, v))
        return attend_dense(q, k, v, kernel)
    parts = []
    for group in packing.groups:
        keys, values = (x[group.keys].unflatten(0, (-1, group.length)) for x in (k, v))
        parts.append(attend_dense(q[group.rows], keys, values, kernel))
    # Not counted from the lengths: compiled code would be made anew for each set of them.
    parts.append(torch.zeros_like(q[: packing.without_keys]))
    return torch.cat(parts)[packing.order]


@torch.compiler.assume_constant_result
def _dense_kernel(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    kernel = choose(backend, device, dtype, head_dim)
    _log_once("self-attention", _in_words(kernel), device.type, dtype)
    return kernel


@torch.compiler.assume_constant_result
def _packed_kernel(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> PackedKernel:
    kernel: PackedKernel = choose(backend, device, dtype, head_dim)
    if (
        kernel in ("auto", "flash")
        and device.type == "cuda"
        and dtype in HALF
        and head_dim % 8 == 0  # the kernel's own limits
        and torch.cuda.get_device_capability(device) >= (8, 0)
    ):
        kernel = "varlen"
    by_length = "" if kernel in ("flash3", "varlen") else "by equal lengths, "
    _log_once("text attention", by_length + _in_words(kernel), device.type, dtype)
    return kernel


def _in_words(kernel: PackedKernel) -> str:
    if kernel == "varlen":
        return "varlen_attn"
    if kernel == "flash3":
        return "FlashAttention-3"
    return f"scaled_dot_product_attention, {kernel}"


def _move(indices: Tensor, device: torch.device) -> Tensor:
    # From pageable memory this returns before the copy is done on the device, and stays in order.
    return indices.to(device, non_blocking=True)


@functools.cache
def _log_once(what: str, kernel: str, device: str, dtype: torch.dtype) -> None:
    log.info("%s on %s in %s: %s", what, device, dtype, kernel)
