"""PixArt-alpha (arXiv:2310.00426) and PixArt-Sigma (arXiv:2403.04692): images from captions.

As Open-Sora runs them, also on the frames of a short video, all in one attention. Module and
parameter names are those of the state dicts that Open-Sora writes. The authors' files differ from
them as `checkpoint/pixart_start.py` says.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.attention import Attend, Packing, attend
from kinema.models.config import KVCompressConfig, LatentSize, PixArtConfig
from kinema.models.embedding import Linear, PatchEmbed3D, ScalarEmbedder
from kinema.models.layers import (
    MLP,
    CaptionEmbedder,
    CrossAttention,
    FinalLayer,
    KeysValues,
    PackedText,
    RMSNorm,
    SelfAttention,
    gated_add,
    layer_norm,
    modulate,
    modulation,
    unpatchify,
)
from kinema.models.sincos import spatial_table, temporal_table
from kinema.models.transformer import CaptionTransformer, ClipShape


class TokenPooling(nn.Module):
    """A convolution that makes one token of each square of tokens, every channel by itself."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, side, side))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, C, H // side, W // side]`."""
        side = self.weight.shape[2]
        return F.conv2d(x, self.weight, self.bias, stride=side, groups=x.shape[1])


class CompressedSelfAttention(nn.Module):
    """Self-attention of all tokens to fewer keys (PixArt-Sigma, section 2.3)."""

    attend: Attend

    def __init__(self, config: PixArtConfig, compress: KVCompressConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.compress = compress
        self.head_dim = config.head_dim
        self.backend = config.attention
        self.qkv = Linear(dim, 3 * dim)
        if compress.sampling == "conv":
            self.sr = TokenPooling(dim, compress.scale_factor)
            self.norm = nn.LayerNorm(dim)  # eps 1e-5, unlike all others
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.proj = Linear(dim, dim)
        self.attend = attend

    def forward(self, x: Tensor, grid: LatentSize) -> Tensor:
        """
        Args:
            x: `[B, L, C]`.
            grid: the L tokens along time, height and width.
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (
            tokens.unflatten(-1, (-1, self.head_dim))
            for tokens in (q, self._fewer(k, grid), self._fewer(v, grid))
        )
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(self.attend(q, k, v, backend=self.backend).flatten(2))

    def _fewer(self, x: Tensor, grid: LatentSize) -> Tensor:
        """`[B, L, C]` to `[B, keys, C]`; what is left over at the right and lower edge is cut."""
        factor = self.compress.scale_factor
        if self.compress.sampling == "uniform_every":
            return x[:, ::factor]
        x = x.unflatten(1, grid)
        if self.compress.sampling == "conv":
            pooled = self.sr(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            # Under autocast the norm gives fp32; keys and values go on in the dtype they had.
            return self.norm(pooled).to(x.dtype).view(len(x), -1, x.shape[-1])
        rows, columns = (size // factor * factor for size in grid[1:])
        return x[:, :, :rows:factor, :columns:factor].flatten(1, 3)


class PixArtBlock(nn.Module):
    """Self-attention over all tokens, text cross-attention, feed-forward."""

    def __init__(self, config: PixArtConfig, index: int) -> None:
        super().__init__()
        dim, heads, backend = config.hidden_size, config.num_heads, config.attention
        self.attn: SelfAttention | CompressedSelfAttention
        if config.kv_compress is not None and config.compresses(index):
            self.attn = CompressedSelfAttention(config, config.kv_compress)
        else:
            self.attn = SelfAttention(dim, heads, qk_norm=config.qk_norm, backend=backend)
        self.cross_attn = CrossAttention(dim, heads, backend=backend)
        self.mlp = MLP(dim, config.mlp_size, dim)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(
        self, x: Tensor, text: Tensor | KeysValues, packing: Packing, t: Tensor, grid: LatentSize
    ) -> Tensor:
        """
        Args:
            x: tokens `[B, T, S, C]`.
            text: packed text tokens `[sum of lengths, C]`, or their keys and values.
            packing: which text tokens belong to which sample.
            t: modulation `[B, 1, 6 * C]` fp32.
            grid: tokens along time, height and width.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(self.scale_shift_table, t)
        rows = modulate(layer_norm(x), shift, scale).flatten(1, 2)
        compressed = isinstance(self.attn, CompressedSelfAttention)
        attended = self.attn(rows, grid) if compressed else self.attn(rows)
        x = gated_add(x, gate, attended.view_as(x))
        x = x + self.cross_attn(x.flatten(1, 2), text, packing).view_as(x)
        return gated_add(x, gate_mlp, self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp)))


class PixArt(CaptionTransformer):
    """Predicts the noise of IDDPM, then as many channels for its variance (`pred_sigma`).

    The original's classes are settings here: `PixArtMS` is `size_conditions`, `PixArt_Sigma` is
    `qk_norm` and `kv_compress`. Timesteps run from 0 (data) to 1000 (noise). Casting to half
    precision keeps timesteps, sizes and positions in fp32.
    """

    config: PixArtConfig

    def __init__(self, config: PixArtConfig, generator: torch.Generator | None = None) -> None:
        """
        Args:
            config: its size.
            generator: for the initial values; None: PyTorch's own.
        """
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, dim)
        self.t_embedder = ScalarEmbedder(dim)
        if config.size_conditions:
            self.csize_embedder = ScalarEmbedder(dim // 3)
            self.ar_embedder = ScalarEmbedder(dim // 3)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.model_max_length)
        self.blocks = nn.ModuleList(PixArtBlock(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(dim, math.prod(config.patch_size), config.out_channels)
        initialise(self, generator)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | PackedText,
        *,
        mask: Tensor | None = None,
        hw: Tensor | None = None,
        ar: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: noised latent `[B, C, T, H, W]`; sizes that patches do not divide are padded.
            timestep: `[B]`, 0 (data) to 1000 (noise).
            y: text features `[B, 1, L, caption_channels]`, or what `prepare_text` made of them.
            mask: text tokens to keep, `[B, L]`, True or 1 = keep; a mask of fewer rows is tiled.
                On the CPU it spares a wait for the GPU.
            hw: height and width of the picture in pixels, `[B, 2]`; fewer rows are tiled. With
                `size_conditions` alone.
            ar: height / width, `[B, 1]`; the same.

        Returns:
            `[B, out_channels, T, H, W]` fp32.

        Raises:
            KinemaError: text features of another width; a latent too small to shorten its keys.
        """
        grid = self.config.token_grid((x.shape[2], x.shape[3], x.shape[4]))
        self._require_keys(grid)
        dtype = self.x_embedder.proj.weight.dtype
        text = self.pack_text(y, mask)

        t = self.t_embedder(timestep)
        if self.config.size_conditions:
            assert hw is not None
            assert ar is not None
            sizes = [(self.csize_embedder, hw), (self.ar_embedder, ar)]
            t = t + torch.cat([_each(*size, len(x)) for size in sizes], dim=1)
        # fp32 again right after the network: sums of it are not to be rounded.
        t_mlp = self.t_block(t.to(dtype)).float()[:, None]  # [B, 1, 6C]

        # fp32 for the sum with positions; then the weights' dtype down the whole residual stream.
        tokens = (self.x_embedder(x.to(dtype)) + self._positions(grid, x.device)).to(dtype)
        for block, of_block in zip(self.blocks, text.per_block, strict=True):
            tokens = block(tokens, of_block, text.packing, t_mlp, grid)
        out = self.final_layer(tokens, t)
        return unpatchify(out, grid, self.config.patch_size, x.shape).float()

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor | PackedText,
        *,
        mask: Tensor | None,
        x_mask: Tensor | None,
        shape: ClipShape,
    ) -> Tensor:
        """See `Transformer.predict`."""
        assert x_mask is None
        sizes = {}
        if self.config.size_conditions:
            sizes["hw"] = torch.stack([shape.height, shape.width], dim=1)
            sizes["ar"] = (shape.height / shape.width)[:, None]
        out: Tensor = self(x, timestep, text, mask=mask, **sizes)
        return out

    def recomputed_tensors(self) -> dict[str, Tensor]:
        """See `Transformer.recomputed_tensors`."""
        frames, rows, columns = self.config.token_grid(self.config.input_size)
        cpu = torch.device("cpu")
        return {
            "pos_embed": self._spatial(rows, columns, cpu)[None],
            "pos_embed_temporal": self._temporal(frames, cpu)[None],
        }

    def _positions(self, grid: LatentSize, device: torch.device) -> Tensor:
        """`[T or 1, S, C]` fp32."""
        frames, rows, columns = grid
        table = self._spatial(rows, columns, device)[None]
        if self.config.no_temporal_pos_emb:
            return table
        return table + self._temporal(frames, device)[:, None]

    def _spatial(self, rows: int, columns: int, device: torch.device) -> Tensor:
        return spatial_table(
            self.config.hidden_size,
            rows,
            columns,
            scale=self.config.space_scale,
            base_size=self.config.position_grid,
            device=device,
        )

    def _temporal(self, frames: int, device: torch.device) -> Tensor:
        dim, scale = self.config.hidden_size, self.config.time_scale
        return temporal_table(dim, frames, scale=scale, device=device)

    def _require_keys(self, grid: LatentSize) -> None:
        compress = self.config.kv_compress
        if compress is not None and not compress.keys(grid):
            rows, columns = (compress.scale_factor * p for p in self.config.patch_size[1:])
            raise KinemaError(
                f"a latent of {grid[1]}x{grid[2]} tokens is too small: blocks make one key of "
                f"{compress.scale_factor}x{compress.scale_factor} tokens",
                where="model.kv_compress",
                hint=f"latents of at least {rows}x{columns}",
            )


def _each(embedder: ScalarEmbedder, values: Tensor, batch: int) -> Tensor:
    """Every number of a row by itself, one vector behind the other: `[B, N]` to `[B, N * dim]`."""
    vectors = embedder(values.flatten()).view(len(values), -1)
    return vectors.repeat(batch // len(values), 1)


@torch.no_grad()
def initialise(model: PixArt, generator: torch.Generator | None = None) -> None:
    """Set every parameter and buffer.

    | what | value |
    |---|---|
    | linear layers, patch projection (as a matrix) | Xavier uniform, bias 0 |
    | timestep, size and caption networks, `t_block` | normal with deviation 0.02, bias 0 |
    | output of text attention, last linear layer | 0 |
    | modulation tables, stand-in for captions | normal with deviation 1/sqrt(width) |
    | pooling of keys | the mean, bias 0 |
    | norms | 1, bias 0 |

    Args:
        model: a complete model; on the meta device nothing happens.
        generator: where the draws come from; None: PyTorch's own.
    """
    small = ("t_embedder.", "csize_embedder.", "ar_embedder.", "t_block.", "y_embedder.")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.startswith(small):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (PixArtBlock, FinalLayer)):
            table = module.scale_shift_table
            nn.init.normal_(table, std=table.shape[1] ** -0.5, generator=generator)
        elif isinstance(module, TokenPooling):
            nn.init.constant_(module.weight, module.weight.shape[2] ** -2)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    patch, null = model.x_embedder.proj, model.y_embedder.y_embedding
    nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1), generator=generator)
    nn.init.zeros_(patch.bias)
    nn.init.normal_(null, std=null.shape[1] ** -0.5, generator=generator)
    for layer in [model.final_layer.linear, *(a.proj for a in model.cross_attentions())]:
        nn.init.zeros_(layer.weight)
