"""Layers of the 1.x transformers: attention over tokens and over text, feed-forward, norms.

Parameter names are those of the released state dicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.attention import Attend, AttendPacked, Packing, attend, attend_packed
from kinema.models.config import AttentionBackend
from kinema.models.embedding import Linear, rotate

NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a learned scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # The kernel accumulates in fp32 whatever the dtype of its input.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), NORM_EPS)


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the last dimension without scale or shift; accumulates in fp32."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift` in one pass over x.

    Args:
        x: `[..., C]`.
        shift, scale: fp32, broadcast to x.
    """
    return torch.addcmul(shift.to(x.dtype), x, (1 + scale).to(x.dtype))


def modulation(table: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Shifts, scales and gates of a block: its own table plus what the timestep says.

    Args:
        table: `[N, C]`.
        t: `[B, T or 1, N * C]` fp32.

    Returns:
        N vectors `[B, T or 1, 1, C]` fp32: few, and rounded only where they meet the tokens.
    """
    return (table.float() + t.unflatten(-1, table.shape))[:, :, :, None].unbind(2)


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`x + gate * update` in one pass over x, in x's dtype."""
    return torch.addcmul(x, gate.to(x.dtype), update.to(x.dtype))


class SelfAttention(nn.Module):
    """Attention among the tokens of a row, optionally with normalised queries and keys."""

    attend: Attend

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_norm: bool,
        rotate_first: bool = False,
        backend: AttentionBackend = "auto",
    ) -> None:
        """
        Args:
            qk_norm: RMS-normalise queries and keys, per head.
            rotate_first: rotary positions come before that norm (1.1), not after it (1.2).
            backend: see `attend`.
        """
        super().__init__()
        self.head_dim = dim // num_heads
        self.rotate_first = rotate_first
        self.backend: AttentionBackend = backend
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)
        self.attend = attend

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """
        Args:
            x: `[B, L, C]`.
            rotation: rotary positions of queries and keys, from `RotaryEmbedding`, or None.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        if x.shape[1] == 1:
            return self.proj(self._only_key(v).flatten(2))
        if rotation is not None and self.rotate_first:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None and not self.rotate_first:
            q, k = rotate(q, rotation), rotate(k, rotation)
        # Norm and rotation may have upcast; the kernel wants one dtype.
        out = self.attend(q.to(v.dtype), k.to(v.dtype), v, backend=self.backend)
        return self.proj(out.flatten(2))

    def _only_key(self, v: Tensor) -> Tensor:
        """Attention to a single key is its value, whatever the query (images, in time)."""
        if torch.is_grad_enabled():
            # Norm weights then have gradient zero, not none: ranks must agree on what they reduce.
            for norm in (self.q_norm, self.k_norm):
                for weight in norm.parameters():
                    v = v + 0 * weight.sum().to(v.dtype)
        return v


KeysValues = tuple[Tensor, Tensor]
"""Keys and values of packed text tokens, `[sum of lengths, heads, D]` each."""


@dataclass(frozen=True)
class PackedText:
    """Captions as blocks take them: kept tokens only, row after row."""

    per_block: tuple[Tensor | KeysValues, ...]
    """What each cross-attention takes, in the order of the blocks: the same tokens for all,
    `[sum of lengths, C]`, or, prepared, its own keys and values."""
    packing: Packing
    """Whose they are."""


class CrossAttention(nn.Module):
    """Attention of every token of a row to the text tokens of that row."""

    attend: AttendPacked

    def __init__(self, dim: int, num_heads: int, *, backend: AttentionBackend = "auto") -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.backend: AttentionBackend = backend
        self.q_linear = Linear(dim, dim)
        self.kv_linear = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.attend = attend_packed

    def keys_values(self, text: Tensor) -> KeysValues:
        """All that depends on the text alone.

        Args:
            text: packed text tokens `[sum of lengths, C]`.
        """
        k, v = self.kv_linear(text).unflatten(-1, (2, -1, self.head_dim)).unbind(1)
        return k, v

    def forward(self, x: Tensor, text: Tensor | KeysValues, packing: Packing) -> Tensor:
        """
        Args:
            x: `[B, L, C]`.
            text: packed text tokens `[sum of lengths, C]`, or what `keys_values` made of them.
            packing: whose they are.
        """
        q = self.q_linear(x).unflatten(-1, (-1, self.head_dim))
        k, v = self.keys_values(text) if isinstance(text, Tensor) else text
        out = self.attend(q, k, v, packing, backend=self.backend)
        return self.proj(out.flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU in its tanh form between them."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = Linear(in_features, hidden_features)
        self.fc2 = Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Projects text features; holds the learned stand-in for "no caption"."""

    y_embedding: Tensor

    def __init__(self, in_channels: int, dim: int, max_length: int) -> None:
        super().__init__()
        self.y_proj = MLP(in_channels, dim, dim)
        self.register_buffer("y_embedding", torch.empty(max_length, in_channels))

    def forward(self, y: Tensor) -> Tensor:
        """`[..., in_channels]` to `[..., dim]`."""
        return self.y_proj(y)

    def drop(self, y: Tensor, drop: Tensor) -> Tensor:
        """Put the stand-in where `drop` (`[B]` bool) is True: `[B, 1, L, in_channels]`."""
        null = self.y_embedding[: y.shape[2]].to(y.dtype)
        return torch.where(drop[:, None, None, None], null, y)


class FinalLayer(nn.Module):
    """From tokens to patches of the output."""

    def __init__(self, dim: int, patch_elements: int, out_channels: int) -> None:
        super().__init__()
        self.linear = Linear(dim, patch_elements * out_channels)
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))

    def forward(
        self, x: Tensor, t: Tensor, t0: Tensor | None = None, x_mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: `[B, T, S, C]`.
            t: time embedding `[B, C]` fp32, as it was before the blocks' own network.
            t0: the same for timestep 0, with x_mask.
            x_mask: `[B, T]` bool, True = noised frame.
        """
        out = self._modulated(x, t)
        if x_mask is not None:
            assert t0 is not None
            # Clean frames are normalised and modulated twice: the released weights learned so.
            out = torch.where(x_mask[:, :, None, None], out, self._modulated(out, t0))
        return self.linear(out)

    def _modulated(self, x: Tensor, t: Tensor) -> Tensor:
        vectors = self.scale_shift_table.float() + t[:, None]  # fp32, as in the blocks
        shift, scale = vectors[:, None, :, None].unbind(2)
        return modulate(layer_norm(x), shift, scale)


def unpatchify(
    x: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int], shape: torch.Size
) -> Tensor:
    """Tokens back to a latent.

    Args:
        x: `[B, T, S, patch * C]`, or `[B, T * S, patch * C]`.
        grid: tokens along time, height and width.
        patch: latent frames, rows and columns of a token.
        shape: of the input `[B, _, T, H, W]`, to whose size the padded latent is cut.

    Returns:
        `[B, C, T, H, W]`.
    """
    channels = x.shape[-1] // math.prod(patch)
    x = x.reshape(x.shape[0], *grid, *patch, channels)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
    return x[:, :, : shape[2], : shape[3], : shape[4]]
