"""The processes of a run and what they tell one another; one process is a world of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from kinema.config.errors import KinemaError
from kinema.parallel.meeting import meet

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: the first step of a large model takes minutes."""


@dataclass(frozen=True)
class World:
    """This process among the `size` processes of a run.

    Attributes:
        rank: 0 … size - 1; rank 0 writes.
        size: number of processes.
        device: where this process computes.
        local_size: number of those on this machine.
    """

    rank: int
    size: int
    device: torch.device
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place. CPU tensors go over gloo and make no GPU wait."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Each rank's `value` (picklable, small), by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (picklable, small) on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def wait_at_most(self, seconds: float) -> None:
        """From now on, how long a collective operation of any group waits for other ranks.

        Longer than that, and NCCL ends this process; gloo raises an error.
        """
        if self.size == 1:
            return
        limit = timedelta(seconds=seconds)
        for group in list(c10d._world.pg_map):
            c10d._set_pg_timeout(limit, group)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(torch.zeros(1))


@contextmanager
def open_world(
    device: str | None = None, *, timeout: timedelta = TIMEOUT, group: bool = False
) -> Iterator[World]:
    """Join the other processes that torchrun started; without torchrun, a world of one.

    Args:
        device: `cpu` or `cuda`; a GPU where there is one by default.
        timeout: how long a process waits for the others.
        group: a world of one has a process group too, as sharding needs it.

    Raises:
        KinemaError: no such device, or more processes than GPUs on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1 and not group:
        yield World(0, 1, chosen)
        return
    # Both backends: gradients go over NCCL, the few bytes that ranks agree by over gloo.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if size == 1:  # nobody to meet: no port is needed
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        found, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = meet(found, rank, size, timeout=timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, chosen, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    except BaseException:
        if chosen.type == "cuda":
            # Leaving in order waits for operations that the others may never join.
            c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _device(name: str | None, local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if name is None:
        name = "cuda" if count else "cpu"
    if name not in ("cpu", "cuda"):
        raise KinemaError(f"device {name!r} is not known", hint="--device cpu or --device cuda")
    if name == "cpu":
        return torch.device("cpu")
    if local_rank >= count:
        raise KinemaError(
            f"process {local_rank} of this machine has no GPU: PyTorch sees {count}",
            hint="--device cpu, or torchrun --nproc-per-node as many as there are GPUs",
        )
    return torch.device("cuda", local_rank)
