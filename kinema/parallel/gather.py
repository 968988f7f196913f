"""Whole tensors out of sharded ones, each on the one rank that needs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from kinema.parallel.world import World

Keep = Callable[[str, Tensor], Tensor]
"""Makes of a whole tensor on its device what the owner keeps of it."""


def to_cpu(name: str, tensor: Tensor) -> Tensor:
    """A copy on the CPU."""
    return tensor.to("cpu", copy=True)


@torch.no_grad()
def whole(
    tensors: Mapping[str, Tensor],
    world: World,
    owner: Callable[[str], int],
    *,
    keep: Keep = to_cpu,
) -> dict[str, Tensor]:
    """The whole tensors that this rank owns, in the order of `tensors`. Collective.

    Sharded tensors travel to their owner only, one for every owner at a time: what is in memory
    beside the shards is about one whole tensor, and every rank receives at the same time. Of
    replicated ones the owner keeps its own.

    Args:
        tensors: plain ones and DTensors, the same names on every rank.
        owner: the rank that gets a tensor, by name; the same answers on every rank.
        keep: called by the owner with each whole tensor on its device.
    """
    kept: dict[str, Tensor] = {}
    sharded: dict[str, DTensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if owner(name) == world.rank:
                kept[name] = keep(name, tensor.detach())
        elif _rows_shared(tensor) is None:
            value = tensor.full_tensor()
            if owner(name) == world.rank:
                kept[name] = keep(name, value)
        else:
            sharded[name] = tensor
    for names in _rounds(sharded, owner):
        kept |= _exchange({name: sharded[name] for name in names}, owner, keep)
    return {name: kept[name] for name in tensors if name in kept}


def _rows_shared(tensor: DTensor) -> int | None:
    """The mesh axis over which the rows are shared out, if that is all that is done to it."""
    axes = [i for i, p in enumerate(tensor.placements) if not isinstance(p, Replicate)]
    # By type: a strided shard is a subclass and lies in another order.
    plain = len(axes) == 1 and type(tensor.placements[axes[0]]) is Shard
    return axes[0] if plain and tensor.placements[axes[0]].is_shard(0) else None


def _rounds(sharded: Mapping[str, DTensor], owner: Callable[[str], int]) -> Iterator[list[str]]:
    """Names in groups in which every owner, in every group of ranks, comes once at most."""
    queues: dict[int, list[str]] = {}
    for name in reversed(list(sharded)):
        queues.setdefault(owner(name), []).append(name)
    while queues:
        yield [names.pop() for names in queues.values()]
        queues = {rank: names for rank, names in queues.items() if names}


def _exchange(
    tensors: Mapping[str, DTensor], owner: Callable[[str], int], keep: Keep
) -> dict[str, Tensor]:
    """One all-to-all for each group of ranks that hold a copy together, in bytes."""
    groups: dict[dist.ProcessGroup, list[str]] = {}
    for name, tensor in tensors.items():
        axis = _rows_shared(tensor)
        assert axis is not None
        groups.setdefault(tensor.device_mesh.get_group(axis), []).append(name)
    kept = {}
    for group, names in groups.items():
        members = dist.get_process_group_ranks(group)
        # In a hybrid layout the owner's group alone gathers the tensor.
        by_member = {owner(n): n for n in names if owner(n) in members}
        assert by_member.keys() <= set(members)
        if not by_member:
            continue
        me = members.index(dist.get_rank())
        pieces = {
            rank: tensors[name].to_local().detach().contiguous().reshape(-1).view(torch.uint8)
            for rank, name in by_member.items()
        }
        device = next(iter(pieces.values())).device
        send = torch.cat([pieces[r] for r in members if r in pieces])
        mine = by_member.get(dist.get_rank())
        receiving = [0] * len(members)
        if mine is not None:
            receiving = _shard_bytes(tensors[mine], len(members))
            assert receiving[me] == pieces[dist.get_rank()].numel(), f"{mine} is not in even rows"
        received = torch.empty(sum(receiving), dtype=torch.uint8, device=device)
        sending = [pieces[r].numel() if r in pieces else 0 for r in members]
        dist.all_to_all_single(received, send, receiving, sending, group=group)
        if mine is not None:
            value = received.view(tensors[mine].dtype).view(tensors[mine].shape)
            kept[mine] = keep(mine, value)
    return kept


def _shard_bytes(tensor: DTensor, ranks: int) -> list[int]:
    """Bytes on each rank of a tensor whose rows are shared out as `torch.chunk` does."""
    rows = tensor.shape[0]
    each = math.ceil(rows / ranks)
    row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    return [max(0, min(each, rows - rank * each)) * row for rank in range(ranks)]
