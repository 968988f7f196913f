"""Layers of the 1.x transformers: attention over tokens and over text, feed-forward, norms.

Parameter names are those of the released state dicts.
"""

from __future__ import annotations

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


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`x + gate * update` in one pass over x, in x's dtype."""
    return torch.addcmul(x, gate.to(x.dtype), update.to(x.dtype))


class SelfAttention(nn.Module):
    """Attention among the tokens of a row, optionally with normalised queries and keys."""

    attend: Attend

    def __init__(
        self, dim: int, num_heads: int, *, qk_norm: bool, backend: AttentionBackend = "auto"
    ) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
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
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
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

    def forward(self, x: Tensor, text: Tensor, packing: Packing) -> Tensor:
        """
        Args:
            x: `[B, L, C]`.
            text: packed text tokens `[sum of lengths, C]`.
            packing: whose they are.
        """
        q = self.q_linear(x).unflatten(-1, (-1, self.head_dim))
        k, v = self.kv_linear(text).unflatten(-1, (2, -1, self.head_dim)).unbind(1)
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
