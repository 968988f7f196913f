"""The moving average of the weights, which is what videos are generated from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.parallel.shard import local

NOT_AVERAGED = "pos_embed"
"""1.x recomputes this table from the sizes; its parameter, where a model has one, is constant."""


class EMA:
    """`average = decay·average + (1 - decay)·weight` after every update, in float32.

    bf16 cannot hold it: at 0.9999 a step's change is below half a unit in its last place and
    the average would stand still. Only trainable parameters are averaged; frozen ones, buffers
    and `pos_embed` stay as they were when the average began, so that `state_dict` is a whole
    model. Of a sharded model each rank averages its own part.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise KinemaError(f"EMA decay is {decay}; it must be at least 0 and below 1")
        self.decay = decay
        self._names = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name != NOT_AVERAGED
        ]
        averaged = set(self._names)
        self._state = {
            name: value.detach().to(torch.float32 if name in averaged else value.dtype, copy=True)
            for name, value in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the model's weights; once per optimizer update."""
        weights = dict(model.named_parameters())
        torch._foreach_lerp_(
            [local(self._state[name]) for name in self._names],
            [local(weights[name]).float() for name in self._names],
            1.0 - self.decay,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged model under the model's own names: float32 where averaged. The tensors
        are the live ones: `update` changes them in place, and a checkpoint fills them."""
        return dict(self._state)
