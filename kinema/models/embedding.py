"""What tokens are told besides their content: patch, place, time, frame rate, caption."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.config import FREQUENCY_CHANNELS


class Linear(nn.Linear):
    """A linear layer whose values its model sets, once, when it is complete."""

    def reset_parameters(self) -> None:
        """Nothing: a second initialisation of a large model would cost minutes."""


class PatchProjection(nn.Module):
    """Weights of a convolution whose stride is its kernel, as the released state dict has them."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_channels, *patch_size))
        self.bias = nn.Parameter(torch.empty(dim))


class PatchEmbed3D(nn.Module):
    """Cuts a latent into patches and projects each to a token; pads with zeros behind."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(patch_size, in_channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, H, W]` to `[B, frames, rows * columns, dim]`."""
        padding = []
        for size, patch in zip(reversed(x.shape[2:]), reversed(self.patch_size), strict=True):
            padding += [0, -size % patch]
        x = F.pad(x, padding) if any(padding) else x
        for axis, patch in zip((2, 4, 6), self.patch_size, strict=True):
            x = x.unflatten(axis, (-1, patch))
        # Patches do not overlap, so this is a matrix product: exact, and far from the slow paths
        # that three-dimensional convolutions have in half precision.
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(2, 3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def sinusoids(values: Tensor, channels: int = FREQUENCY_CHANNELS) -> Tensor:
    """Cosines, then sines, of values at frequencies from 1 down towards 1/10000.

    Args:
        values: `[N]`, any dtype; computed in fp32 (bf16 cannot tell timestep 999 from 1000).

    Returns:
        `[N, channels]` fp32.
    """
    angles = values.float()[:, None] * _frequencies(channels).to(values.device, non_blocking=True)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _frequencies(channels: int) -> Tensor:
    """The same fp32 numbers on every machine, on the CPU.

    One unit in the last place of a frequency moves a cosine at timestep 1000 by 3e-5, and fp32
    `exp`, which the original takes, differs by that much between CPUs. So: the original's fp32
    exponents, `exp` in double precision, rounded once.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device="cpu")
    frequencies = torch.exp((-math.log(10000) * steps / half).double()).float()
    if channels == FREQUENCY_CHANNELS:
        # The two of all that matter where the recorded original (and so, we take it, the machines
        # that trained the released weights) rounded the other way, by 0.53 and 0.504 units.
        rounded_up = [13, 44]
        frequencies[rounded_up] = frequencies[rounded_up].nextafter(torch.tensor(1.0, device="cpu"))
    return frequencies


class ScalarEmbedder(nn.Module):
    """A number (timestep, frame rate) as a vector: sinusoids through a small network."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(FREQUENCY_CHANNELS, dim), nn.SiLU(), Linear(dim, dim))

    def forward(self, values: Tensor) -> Tensor:
        """`[N]` to `[N, dim]` fp32."""
        features = sinusoids(values).to(self.mlp.get_parameter("0.weight").dtype)
        # Sums of these feed every block: fp32 from here on.
        return self.mlp(features).float()


def position_embedding(
    dim: int, rows: int, columns: int, *, scale: Tensor, base_size: int | None
) -> Tensor:
    """Sinusoids of where a token lies: the first half of the channels from its column.

    Args:
        dim: channels, a multiple of 4.
        rows, columns: size of the token grid.
        scale: how large the picture is against the one for which a step is one; a 0-d tensor.
        base_size: side of the square grid onto which both axes are stretched; None: do not.

    Returns:
        `[rows * columns, dim]` fp32 on the device of `scale`, row after row.
    """
    half, device = dim // 2, scale.device
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequencies = 1.0 / 10000**exponents

    def along(size: int) -> Tensor:
        place = torch.arange(size, dtype=torch.float32, device=device) / scale.float()
        if base_size is not None:
            place = place * (base_size / size)
        angles = place[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    by_column = along(columns)[None].expand(rows, -1, -1)
    by_row = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1)


class RotaryEmbedding(nn.Module):
    """Rotary positions over adjacent pairs of channels (RoPE, arXiv:2104.09864)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # A parameter because the released state dict has it as one; it never trains.
        self.freqs = nn.Parameter(
            1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim), requires_grad=False
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Frequencies stay fp32 when the model is cast: rounded ones drift with the frame number.
        exact = self.freqs.detach()
        super()._apply(fn, recurse)
        if self.freqs.dtype != torch.float32:
            self.freqs.data = exact.to(self.freqs.device)
        return self

    def forward(self, length: int) -> Tensor:
        """Cosine and sine for positions 0 to length: `[length, 1, dim / 2, 2]` fp32."""
        places = torch.arange(length, dtype=torch.float32, device=self.freqs.device)
        angles = places[:, None, None] * self.freqs.float()
        return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle.

    Args:
        x: `[B, L, heads, D]`.
        rotation: from `RotaryEmbedding`, fp32 as is the arithmetic.

    Returns:
        `[B, L, heads, D]` fp32.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # no complex numbers there, and passes are fused anyway
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    # A pair as one complex number: one pass and one saved tensor less than sines and cosines.
    turned = torch.view_as_complex(pairs) * torch.view_as_complex(rotation)
    return torch.view_as_real(turned).flatten(-2)
