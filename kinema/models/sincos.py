"""Position tables of the models before STDiT2: STDiT 1.0, DiT, Latte and PixArt.

Released files carry them as buffers; here they are computed for the actual size. Angles are in
fp64, as in the original, where frequencies of the last channels leave little to round.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spatial_table(
    dim: int,
    rows: int,
    columns: int,
    *,
    scale: float = 1.0,
    base_size: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Sines and cosines of where a token lies: the first half of the channels from its column.

    Args:
        dim: channels, a multiple of 4.
        rows, columns: size of the token grid.
        scale: positions are divided by it.
        base_size: side of the square grid onto which both axes are stretched; None: do not.

    Returns:
        `[rows * columns, dim]` fp32, row after row.
    """

    def along(size: int) -> Tensor:
        place = torch.arange(size, dtype=torch.float32, device=device) / scale
        if base_size is not None:
            place = place * (base_size / size)
        return _sines_and_cosines(dim // 2, place)

    by_column = along(columns)[None].expand(rows, -1, -1)
    by_row = along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1)


def temporal_table(
    dim: int, frames: int, *, scale: float = 1.0, device: torch.device | None = None
) -> Tensor:
    """Sines, then cosines, of the number of a frame divided by `scale`: `[frames, dim]` fp32."""
    place = torch.arange(frames, dtype=torch.float64, device=device) / scale
    return _sines_and_cosines(dim, place)


def _sines_and_cosines(channels: int, place: Tensor) -> Tensor:
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float64, device=place.device)
    angles = place.double()[:, None] * 10000.0 ** (-steps / half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
