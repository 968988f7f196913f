"""Sharding by PyTorch's FSDP2: who holds which part of a model, and in which precision it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kinema.config.errors import KinemaError
from kinema.parallel.config import ParallelConfig, check_groups
from kinema.parallel.recompute import modules_named
from kinema.parallel.world import World

EXACT = ("rope.freqs",)
"""Parameters that stay whole and float32 whatever the precision of the others: rotary frequencies,
which never train; rounded ones drift with the frame number."""


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (without gradients); any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_mesh(world: World, config: ParallelConfig) -> DeviceMesh:
    """The ranks as FSDP2 takes them: `[shard]`, or `[replicate, shard]` (hybrid) where fewer than
    all hold one copy together. Neighbouring ranks, those of a machine, are along `shard`.

    Collective: every rank of the run calls it.

    Raises:
        KinemaError: ranks that do not divide into groups of that size; machines with different
            numbers of them, or with one each.
    """
    over = world.size
    if config.shard_over == "node":
        over = world.local_size
        sizes = world.gather(over)
        if len(set(sizes)) > 1:
            raise KinemaError(
                f"machines run {' and '.join(map(str, sorted(set(sizes))))} processes",
                where="parallel.shard_over",
                hint="as many processes on every machine, or shard_over: all",
            )
    elif config.shard_over != "all":
        over = min(config.shard_over, world.size)  # a recipe for many runs on few
    check_groups(over, world.size)
    kind = world.device.type
    if over == world.size:
        return init_device_mesh(kind, (over,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (world.size // over, over), mesh_dim_names=("replicate", "shard"))


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    keep: bool,
    dtype: torch.dtype,
    blocks: Sequence[str],
) -> None:
    """Shard a model in place, each block by itself and the rest together.

    Parameters become DTensors in the dtype they have (the masters). The model runs on copies of
    them in `dtype`, gathered when a block runs, and without autocast: it keeps to float32 by itself
    what needs it, as when it is cast for generation. Gradients are averaged in the masters' dtype.
    Only a rank's part moves to the mesh's device, block after block.

    Args:
        keep: gathered weights stay until the backward pass is done with them (ZeRO-2); False
            frees those of a block when it has run, and gathers them again for its backward pass
            (ZeRO-3).
        dtype: of the arithmetic.
        blocks: names of what is gathered at once; `*` stands for one part of a dotted name.
    """
    named = dict(model.named_parameters())
    exact = {p for name, p in named.items() if name in EXACT}
    assert not any(p.requires_grad for p in exact)
    masters = {p.dtype for p in named.values() if p not in exact}
    assert len(masters) == 1, masters
    mixed = dtype not in masters
    settings: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": exact,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=dtype if mixed else None,
            reduce_dtype=masters.pop() if mixed else None,
            # Modulation, rotation and the output are float32 in half-precision models as well.
            cast_forward_inputs=False,
        ),
    }
    _without_autocast(model)
    for block in modules_named(model, blocks, where="parallel").values():
        fully_shard(block, reshard_after_forward=not keep, **settings)
    # What the root holds is needed at the very end of the forward pass, and so at once afterwards.
    fully_shard(model, reshard_after_forward=False, **settings)
    device = torch.device(mesh.device_type)
    for parameter in exact:
        parameter.data = parameter.data.to(device)


def units_of(model: nn.Module) -> list[FSDPModule]:
    """The model and its blocks, as far as each is gathered by itself."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _without_autocast(model: nn.Module) -> None:
    cls = type(model)
    model.__class__ = type(f"Sharded{cls.__name__}", (_OwnPrecision, cls), {})


@dataclass(frozen=True)
class _OnHost:
    value: Tensor


def _hidden(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_cpu and not value.is_floating_point():
        return _OnHost(value)
    return value


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, _OnHost) else value


class _OwnPrecision(nn.Module):
    """Frozen networks beside the model run under autocast; the model's weights have their dtype.

    On a GPU FSDP2 moves every tensor it is given there. What decides sizes, as masks of text do, is
    wanted on the CPU: there and back, the host would wait for all that is queued.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = {name: _hidden(value) for name, value in kwargs.items()}
        return super().__call__(*map(_hidden, args), **hidden)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_shown, args))
        kwargs = {name: _shown(value) for name, value in kwargs.items()}
        kind = next(self.parameters()).device.type
        with torch.autocast(kind, enabled=False):
            out = super().forward(*args, **kwargs)
        # FSDP2's hook sits on the output, and would be lost on a view that is changed in place.
        return out.clone() if isinstance(out, Tensor) and out._is_view() else out
