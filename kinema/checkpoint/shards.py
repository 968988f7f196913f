"""Filling sharded tensors from whole ones on disk: each rank reads the rows that it holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinema.checkpoint.errors import WeightsError
from kinema.checkpoint.layout import Stored
from kinema.checkpoint.source import TensorSource


@torch.no_grad()
def read_into(into: Tensor, tensors: TensorSource, stored: Stored) -> None:
    """Copy a tensor of a file into one in memory, sharded or not; the dtype stays as it is there.

    No rank needs another for this. Of a tensor sharded by rows that lies in the file as it is
    here, only those rows are read.

    Args:
        into: has memory.
        stored: where in the file it lies.
    """
    if not isinstance(into, DTensor):
        into.copy_(stored.read(tensors.read, into.shape))
        return
    offsets, sizes = piece_of(into)
    local = into.to_local()
    if not local.numel():
        return
    name = stored.names[0]
    as_here = stored == Stored((name,)) and tensors.shapes[name] == into.shape
    if as_here and sizes[1:] == into.shape[1:]:
        local.copy_(tensors.read_rows(name, offsets[0], offsets[0] + sizes[0]))
    else:
        copy_piece(into, stored.read(tensors.read, into.shape))


@torch.no_grad()
def copy_piece(into: DTensor, value: Tensor) -> None:
    """Copy this rank's piece of a whole tensor into a sharded one."""
    for axis, (offset, size) in enumerate(zip(*piece_of(into), strict=True)):
        value = value.narrow(axis, offset, size) if size else value[:0]
    if into.to_local().numel():
        into.to_local().copy_(value)


def piece_of(tensor: DTensor) -> tuple[torch.Size, torch.Size]:
    """Offsets and sizes of what this rank holds of a sharded tensor."""
    (chunk,) = tensor.__create_chunk_list__()
    return chunk.offsets, chunk.sizes


def fill_tensors(into: Mapping[str, Tensor], tensors: TensorSource, *, whose: str) -> None:
    """Fill tensors in place, sharded or not; nothing is touched before names and shapes fit.

    Args:
        whose: for the message: "this average".

    Raises:
        WeightsError: names or shapes differ.
    """
    saved = tensors.shapes
    missing, unexpected = into.keys() - saved.keys(), saved.keys() - into.keys()
    shapes = [name for name in into.keys() & saved.keys() if into[name].shape != saved[name]]
    if missing or unexpected or shapes:
        raise WeightsError(
            f"{whose} belongs to another model: {len(missing)} tensors missing, "
            f"{len(unexpected)} unexpected, {len(shapes)} of another shape, for example "
            f"{min([*missing, *unexpected, *shapes])!r}",
            where=str(tensors.path),
            hint="load it with the recipe that it was trained with",
        )
    for name, tensor in into.items():
        read_into(tensor, tensors, Stored((name,)))
