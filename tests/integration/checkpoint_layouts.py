"""What ranks write in every layout, read back in every other: model, average and moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kinema.checkpoint.optimizer import OptimizerShare
from kinema.checkpoint.parts import Content, complete, write_part
from kinema.checkpoint.run import Checkpoint, begin, plan_save
from kinema.parallel.gather import whole
from kinema.parallel.world import World

LAYOUTS = ("none", "sharded", "hybrid")


class Network(nn.Module):
    """Rows that do not divide by four, fewer than four of them, and numbers without rows."""

    scale: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.table = nn.Parameter(torch.empty(2, 3, 4))
        self.register_buffer("scale", torch.empty(()))
        with torch.no_grad():
            for value in self.state_dict().values():
                value.copy_(torch.randn(value.shape, generator=generator))


def moments(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Like an optimizer's: a tensor beside each parameter, sharded as it is, and a count."""
    named = Network(seed).state_dict()
    result: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        moment = torch.zeros_like(parameter.detach())
        copy_whole(moment, named[name])
        result[f"{name}.exp_avg"] = moment
        result[f"{name}.step"] = torch.tensor(float(seed))
    return result


def copy_whole(into: Tensor, value: Tensor) -> None:
    if isinstance(into, DTensor):
        mesh, placements = into.device_mesh, into.placements
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, mesh, placements)
    into.copy_(value)


def built(layout: str, seed: int, world: World) -> Network:
    model = Network(seed)
    if layout != "none":
        half = world.size // 2
        mesh = (
            init_device_mesh("cpu", (world.size,))
            if layout == "sharded"
            else init_device_mesh("cpu", (2, half), mesh_dim_names=("replicate", "shard"))
        )
        for layer in (model.first, model.second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def check_layouts(world: World, folder: Path) -> None:
    """Raises AssertionError on the rank that has other values than were saved."""
    for number, saved in enumerate(LAYOUTS):
        run = folder / saved
        checkpoint = save(saved, 10 * number, world, run)
        for loaded in LAYOUTS:
            other = built(loaded, 5, world)
            average, optimizer = dict(built(loaded, 6, world).state_dict()), moments(other, 7)
            checkpoint.load_model(other)
            checkpoint.load_tensors("ema", average)
            checkpoint.load_optimizer(optimizer)
            for found, seed in ((dict(other.state_dict()), 0), (average, 1)):
                for name, value in gathered(found, world):
                    assert torch.equal(value, Network(10 * number + seed).state_dict()[name]), name
            for name, value in gathered(optimizer, world):
                parameter, _, kind = name.rpartition(".")
                expected = Network(10 * number + 2).state_dict()[parameter]
                if kind == "step":
                    expected = torch.tensor(10.0 * number + 2)
                assert torch.equal(value, expected), (saved, loaded, name)


def save(layout: str, seed: int, world: World, run: Path) -> Checkpoint:
    model, ema = built(layout, seed, world), built(layout, seed + 1, world)
    optimizer = moments(model, seed + 2)
    weights: dict[str, Mapping[str, Tensor]] = {
        "model": model.state_dict(), "ema": ema.state_dict()
    }  # fmt: skip
    plan = plan_save(run, 0, 1, weights, optimizer, ranks=world.size)
    assert {file.rank for file in plan.files} == {0, world.size // 2}
    if world.is_main:
        begin(plan)
    world.barrier()
    owners = {(file.section, name): file.rank for file in plan.files for name in file.sizes}
    mine = {
        section: whole(tensors, world, lambda name, s=section: owners[s, name])  # type: ignore[misc]
        for section, tensors in weights.items()
    }
    for section, tensors in mine.items():
        expected = {n for (s, n), rank in owners.items() if (s, rank) == (section, world.rank)}
        assert set(tensors) == expected
    share = OptimizerShare(optimizer, world.rank, world.size)
    written = sum(t.numel() for t in share.tensors.values())
    total = sum(t.numel() for t in optimizer.values())
    assert world.sum(torch.tensor(float(written))) == total, "each number is written once"
    write_part(plan, world.rank, mine, share, share.tensors)
    if world.is_main:
        complete(plan, Content({}, {}))
    world.barrier()
    return Checkpoint.open(run)


def gathered(tensors: Mapping[str, Tensor], world: World) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors, looked at by another rank each."""
    names = list(tensors)
    yield from whole(tensors, world, lambda name: names.index(name) % world.size).items()
