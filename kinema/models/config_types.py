"""Types and facts that the settings of several networks share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

LatentSize = tuple[int, int, int]
"""Latent frames, rows and columns: (T, H, W)."""

AttentionBackend = Literal["auto", "math", "efficient", "flash", "cudnn", "flash3"]
"""Kernel behind attention; "flash3" is FlashAttention-3's own package, the others are kernels of
`scaled_dot_product_attention`. "auto" takes "flash3" where it runs, else PyTorch chooses."""

PositiveInt = Annotated[int, Field(gt=0)]

FREQUENCY_CHANNELS = 256
"""Width of the sinusoidal features of a timestep or a frame rate, before their network."""
