"""Where a video's noise comes from: its own seed and sample number, and nothing else."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(seed: int, sample: int, purpose: str) -> torch.Generator:
    """A CPU generator keyed by (seed, sample, purpose); the same on every device and machine."""
    key = hashlib.sha256(f"kinema generation {seed} {sample} {purpose}".encode()).digest()
    # 63 bits: manual_seed takes no more without a sign.
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def initial_noise(seed: int, sample: int, shape: tuple[int, int, int, int]) -> Tensor:
    """The noise a video starts from, float32 `[C, T, H, W]` in latent units, on the CPU."""
    return torch.randn(shape, generator=generator(seed, sample, "latents"), dtype=torch.float32)
