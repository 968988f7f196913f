"""Where a video's noise comes from: its own seed, sample and segment, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kinema.diffusion.process import NoiseOfStep
from kinema.generation.config import GenerateRequest

Shape = tuple[int, int, int, int]
"""Of one latent, (C, T, H, W)."""


def generator(seed: int, sample: int, purpose: str) -> torch.Generator:
    """A CPU generator keyed by (seed, sample, purpose); the same on every device and machine."""
    key = hashlib.sha256(f"kinema generation {seed} {sample} {purpose}".encode()).digest()
    # 63 bits: manual_seed takes no more without a sign.
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def initial_noise(seed: int, sample: int, shape: Shape, segment: int = 0) -> Tensor:
    """The noise a segment starts from, float32 `[C, T, H, W]` in latent units, on the CPU."""
    return _normal(seed, sample, "latents", segment, shape)


def step_noise(
    requests: Sequence[GenerateRequest], segment: int, shape: Shape, device: torch.device
) -> NoiseOfStep:
    """What sampling draws on the way, keyed by each request's own seed, sample and segment."""

    def noise(number: int) -> Tensor:
        rows = [_normal(r.seed, r.sample, f"step {number}", segment, shape) for r in requests]
        drawn = torch.stack(rows)
        if device.type == "cuda":
            drawn = drawn.pin_memory()  # a copy from other memory waits for the steps before it
        return drawn.to(device, non_blocking=True)

    return noise


def _normal(seed: int, sample: int, purpose: str, segment: int, shape: Shape) -> Tensor:
    # The first segment's noise is that of a video of one segment.
    source = generator(seed, sample, f"{purpose}, segment {segment}" if segment else purpose)
    return torch.randn(shape, generator=source, dtype=torch.float32)
