"""What resumes: one list, written to a checkpoint and read from it here and nowhere else.

| what | where in the checkpoint |
|---|---|
| weights (fp32) | model |
| their average | ema |
| AdamW's moments and step counts | optimizer |
| loss scale of fp16 | state.json: scaler |
| step and epoch | the folder's name |
| data position | state.json: data |
| sums since the last logged step | state.json: window |
| what the guard compares with and passes over | state.json: guard |
| seconds of updates that count | state.json: useful_s |

`STATE_VERSION` goes up when the list in state.json changes; other versions are refused.

The learning rate is a function of the step, and random numbers are functions of seed and data
position: there is nothing of them to save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kinema.checkpoint.run import Checkpoint
from kinema.config.errors import KinemaError
from kinema.data.order import SampleOrder
from kinema.training.ema import EMA
from kinema.training.guard import Guard
from kinema.training.optimizer import optimizer_tensors
from kinema.training.window import Window

STATE_VERSION = 1


@dataclass
class TrainState:
    """All that changes while training.

    Attributes:
        step: optimizer updates made.
        epoch: of the last update, from 0.
        position: epoch and step of the epoch that come next.
        useful_s: seconds of the updates that made this state, since the run's first start.
    """

    model: nn.Module
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    order: SampleOrder
    step: int = 0
    epoch: int = 0
    position: tuple[int, int] = (0, 0)
    window: Window = field(default_factory=Window)
    useful_s: float = 0.0
    guard: Guard | None = None

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the optimizer updates."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def average(self) -> Mapping[str, Tensor] | None:
        """The average as a whole state dict."""
        return None if self.ema is None else self.ema.state_dict()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.optimizer, self.trained)

    def values(self) -> dict[str, Any]:
        """The rest, as JSON."""
        return {
            "version": STATE_VERSION,
            "scaler": self.scaler.state_dict(),
            "data": self.order.state(*self.position),
            "window": self.window.state(),
            "useful_s": self.useful_s,
            "guard": None if self.guard is None else self.guard.state(),
        }

    def restore(self, checkpoint: Checkpoint, *, data_position: bool) -> None:
        """Go on where `checkpoint` was written.

        Args:
            data_position: False begins the data anew, at epoch 0.

        Raises:
            KinemaError: another model's checkpoint, or other data; a list of another version.
        """
        values = checkpoint.state
        if values.get("version") != STATE_VERSION:
            raise KinemaError(
                f"cannot be resumed: kinema {checkpoint.versions.get('kinema', '?')} wrote version "
                f"{values.get('version', 'none')} of the state, this one reads {STATE_VERSION}",
                where=str(checkpoint.path),
                hint="go on with the kinema that wrote it, or start a new run from its weights: "
                "--ckpt-path",
            )
        if data_position:
            self.position = self.order.restore(values["data"])
            self.window = Window.from_state(values["window"])
            self.useful_s = values["useful_s"]
            self.epoch = checkpoint.epoch
            if self.guard is not None:
                self.guard.restore(values["guard"])
        self.step = checkpoint.step
        checkpoint.load_model(self.model, "model")
        if self.ema is not None:
            if not checkpoint.has("ema"):
                raise KinemaError(
                    "has no averaged weights (ema), which the recipe asks for",
                    where=str(checkpoint.path),
                    hint="--ckpt-path takes the weights only and starts a new average",
                )
            checkpoint.load_tensors("ema", self.ema.state_dict())
        checkpoint.load_optimizer(self.optimizer_tensors())
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(values["scaler"])
