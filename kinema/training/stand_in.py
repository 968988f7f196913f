"""What a rank without a readable clip runs, so that sharded training does not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

from kinema.models.config import DiTConfig, LatteConfig
from kinema.models.transformer import ClipShape, Transformer


def stand_in_loss(model: Transformer, device: torch.device) -> Tensor:
    """A loss of zero that all parameters have a part in, with gradients of zero.

    One forward pass over a clip of the smallest size: every rank takes part as often in gathering
    weights and averaging gradients, whatever its own clips are.

    Args:
        model: sharded or not.
        device: where it runs.
    """
    config = model.config
    # Two frames, for attention in time to have something to attend to; room for shortened keys.
    frames, rows, columns = config.patch_size
    side = getattr(getattr(config, "kv_compress", None), "scale_factor", 1)
    latent = torch.zeros(
        1, config.in_channels, 2 * frames, side * rows, side * columns, device=device
    )
    if isinstance(config, (DiTConfig, LatteConfig)) and config.num_classes is not None:
        text = torch.zeros(1, dtype=torch.int64, device=device)
    else:
        text = model.null_text(1)
    one = torch.ones(1, device=device)
    out = model.predict(
        latent, one, text, mask=None, x_mask=None, shape=ClipShape(one, one, one, one)
    )
    return 0.0 * out.sum()
