"""The one door to attention: dense, and from many queries to packed text of uneven lengths.

The kernel follows from the configured backend, the device and the dtype, never from the shape of
an input, and is written to the log once. A parallel plan swaps these functions on the modules
that hold them; their bodies stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kinema.models.config import AttentionBackend

log = logging.getLogger(__name__)

MAX_ROWS = 65535
"""Fused CUDA kernels put the batch on a grid axis, which holds no more; also split elsewhere."""

_SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


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
        RuntimeError: the configured backend cannot run on this device and dtype.
    """
    _announce("self-attention", f"scaled_dot_product_attention, {backend}", q.device.type, q.dtype)
    if q.shape[0] > MAX_ROWS:
        parts = zip(q.split(MAX_ROWS), k.split(MAX_ROWS), v.split(MAX_ROWS), strict=True)
        return torch.cat([_attend_rows(*part, backend) for part in parts])
    return _attend_rows(q, k, v, backend)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Tensor:
    chosen = _SDPA_BACKENDS.get(backend)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


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

    Made once per forward pass; all blocks share it.
    """

    lengths: tuple[int, ...]
    """Number of keys of each row."""
    longest: int
    starts: Tensor
    """First key of each row, and the end: `[B + 1]`, int32, where keys and queries are."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Rows with that many keys each, whose keys and queries are on `device`."""
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(tuple(lengths), max(lengths), _move(starts, device))

    @functools.cached_property
    def by_length(self) -> tuple[list[EqualRows], Tensor]:
        """Rows that have keys, gathered by length; and what takes their results back in order.

        The second, `[B]`, indexes the groups' rows followed by the rows without keys.
        """
        device = self.starts.device
        ends = list(itertools.accumulate(self.lengths))
        rows_by_length: defaultdict[int, list[int]] = defaultdict(list)
        for row, length in enumerate(self.lengths):
            rows_by_length[length].append(row)
        empty = rows_by_length.pop(0, [])
        groups, placed = [], []
        for length, rows in rows_by_length.items():
            first = torch.tensor([ends[row] - length for row in rows])
            keys = (first[:, None] + torch.arange(length)).flatten()
            groups.append(EqualRows(length, _move(torch.tensor(rows), device), _move(keys, device)))
            placed += rows
        return groups, _move(torch.tensor(placed + empty).argsort(), device)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, backend: AttentionBackend
) -> Tensor:
    """Attention in which each row of the batch sees its own keys, and no work is done for padding.

    On CUDA in half precision one kernel takes all rows ("auto" and "flash"); otherwise rows of
    equal length run together. A row without keys gets zeros.

    Args:
        q: queries `[B, L, heads, D]`.
        k, v: keys and values of all rows, `[sum of lengths, heads, D]`.
        packing: which keys belong to which row.

    Returns:
        `[B, L, heads, D]`.
    """
    in_one = (
        q.is_cuda
        and backend in ("auto", "flash")
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0  # the kernel's own limits: heads, which the model's size
        and torch.cuda.get_device_capability(q.device) >= (8, 0)  # decides, and the GPU
    )
    kernel = "varlen_attn" if in_one else f"by equal lengths, {backend}"
    _announce("text attention", kernel, q.device.type, q.dtype)
    if in_one:
        return _attend_in_one(q, k, v, packing)
    return _attend_by_length(q, k, v, packing, backend)


def _attend_in_one(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, length = q.shape[:2]
    starts = torch.arange(rows + 1, device=q.device, dtype=torch.int32) * length
    out = varlen_attn(q.flatten(0, 1), k, v, starts, packing.starts, length, packing.longest)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (rows, length))


def _attend_by_length(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, backend: AttentionBackend
) -> Tensor:
    if packing.longest and set(packing.lengths) == {packing.longest}:
        k, v = (x.unflatten(0, (-1, packing.longest)) for x in (k, v))
        return _attend_rows(q, k, v, backend)
    groups, order = packing.by_length
    parts = []
    for group in groups:
        keys, values = (x[group.keys].unflatten(0, (-1, group.length)) for x in (k, v))
        parts.append(_attend_rows(q[group.rows], keys, values, backend))
    parts.append(torch.zeros_like(q[: packing.lengths.count(0)]))
    return torch.cat(parts)[order]


def _move(indices: Tensor, device: torch.device) -> Tensor:
    # From pageable memory this returns before the copy is done on the device, and stays in order.
    return indices.to(device, non_blocking=True)


def _announce(what: str, kernel: str, device: str, dtype: torch.dtype) -> None:
    if not torch.compiler.is_compiling():
        _log_once(what, kernel, device, dtype)


@functools.cache
def _log_once(what: str, kernel: str, device: str, dtype: torch.dtype) -> None:
    log.info("%s on %s in %s: %s", what, device, dtype, kernel)
