"""AdamW over the trained parameters, and its state as a flat dict of tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kinema.training.config import OptimConfig


def build_optimizer(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; the learning rate is set at every step by `training.schedule`."""
    on_gpu = all(p.is_cuda for p in parameters.values())
    optimizer = torch.optim.AdamW(
        list(parameters.values()),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=on_gpu,
    )
    # PyTorch makes this at the first step; made here, a checkpoint can be loaded before it.
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros(
                (), dtype=torch.float32, device=parameter.device if on_gpu else None
            ),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's own tensors (not copies) as `PARAMETER.exp_avg` and so on."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
