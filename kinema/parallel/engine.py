"""What the training loop knows of how a model is spread over the processes of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from kinema.parallel.config import ParallelConfig
from kinema.parallel.gradients import GradientMean, Gradients
from kinema.parallel.recompute import TRANSFORMER_BLOCKS
from kinema.parallel.shard import shard, shard_mesh, units_of
from kinema.parallel.sharded_gradients import ShardedGradients
from kinema.parallel.world import World


class Engine:
    """Spreads a model over the ranks of a world: whole copies, or sharded by FSDP2.

    Made after recomputation and compilation were put on the model, and before its average and its
    optimizer are. Collective under sharding: every rank makes one, and every rank runs as many
    forward and backward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        config: ParallelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        blocks: Sequence[str] = TRANSFORMER_BLOCKS,
    ) -> None:
        """
        Args:
            model: changed in place; on the CPU with sharding, so that only this rank's part of it
                ever is on the GPU.
            config: what is sharded, and over which ranks. A world of one needs a process group
                too: `open_world(group=True)`.
            dtype: of the arithmetic; weights and their gradients keep the dtype they have.
            blocks: modules by name that are gathered at once; `*` stands for one part of a dotted
                name.

        Raises:
            KinemaError: ranks that `shard_over` does not divide.
        """
        self.model = model
        self.sharded = config.shard != "none"
        self._world = world
        self._dtype = dtype
        self._keep = config.shard == "zero2"
        if not self.sharded:
            model.to(world.device)
            return
        self._mesh = shard_mesh(world, config)
        shard(model, self._mesh, keep=self._keep, dtype=dtype, blocks=blocks)

    def gradients(self, parameters: Mapping[str, nn.Parameter]) -> Gradients:
        """What averages the gradients of `parameters`, by name: all that require gradients."""
        if not self.sharded:
            return GradientMean(parameters.values(), self._world)
        group = self._mesh["shard"].get_group()
        return ShardedGradients(self.model, parameters, group, keep_weights=self._keep)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass and the loss, and what frozen networks do for them.

        Without gradients, whatever was gathered is given back at the end.
        """
        mixed = self._dtype in (torch.bfloat16, torch.float16)
        kind = self._world.device.type
        with torch.autocast(kind, dtype=self._dtype if mixed else None, enabled=mixed):
            yield
        if self.sharded and not torch.is_grad_enabled():
            for unit in units_of(self.model):
                unit.reshard()

    def recover(self) -> bool:
        """After a pass that ended in an error, as out of memory: make ready for the next one.

        Gradients are gone.

        Returns:
            Whether that can be done; otherwise model and engine must be made anew.
        """
        if not self.sharded:
            return True
        reset = getattr(self.model, "reset_iter_state", None)  # new in PyTorch 2.13
        if reset is None:
            return False
        for parameter in self.model.parameters():
            parameter.grad = None  # of gathered weights too, before they are given back
        reset()
        return True
