"""STDiT2, the transformer of Open-Sora 1.1: told size, aspect ratio, length and frame rate.

Module and parameter names are those of the released state dict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kinema.models.attention import Packing
from kinema.models.config import STDiT2Config
from kinema.models.embedding import (
    Linear,
    PatchEmbed3D,
    RotaryEmbedding,
    ScalarEmbedder,
    position_embedding,
)
from kinema.models.frames import ALL_AT_HAND, Frames, FramesOf, all_at_hand
from kinema.models.layers import (
    MLP,
    CaptionEmbedder,
    CrossAttention,
    FinalLayer,
    KeysValues,
    PackedText,
    SelfAttention,
    gated_add,
    layer_norm,
    modulate,
    modulation,
    unpatchify,
)
from kinema.models.stdit import initialise
from kinema.models.transformer import CaptionTransformer, ClipShape


class STDiT2Block(nn.Module):
    """Attention within frames, along time, and to the text; feed-forward."""

    def __init__(self, config: STDiT2Config) -> None:
        super().__init__()
        dim, heads, backend = config.hidden_size, config.num_heads, config.attention

        def self_attention() -> SelfAttention:
            return SelfAttention(
                dim,
                heads,
                qk_norm=config.qk_norm,
                rotate_first=config.qk_norm_legacy,
                backend=backend,
            )

        self.attn = self_attention()
        self.attn_temp = self_attention()
        self.cross_attn = CrossAttention(dim, heads, backend=backend)
        self.mlp = MLP(dim, config.mlp_size, dim)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))
        self.scale_shift_table_temporal = nn.Parameter(torch.empty(3, dim))

    def forward(
        self,
        x: Tensor,
        text: Tensor | KeysValues,
        packing: Packing,
        t: Tensor,
        t_temporal: Tensor,
        rotation: Tensor,
        frames: Frames = ALL_AT_HAND,
    ) -> Tensor:
        """
        Args:
            x: tokens `[B, T, S, C]`.
            text: packed text tokens `[sum of lengths, C]`, or their keys and values.
            packing: which text tokens belong to which sample.
            t: modulation within frames and of the feed-forward part, `[B, T or 1, 6 * C]` fp32.
            t_temporal: modulation along time, `[B, T or 1, 3 * C]` fp32.
            rotation: rotary positions in time, of all frames.
            frames: what x holds of the clip.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(self.scale_shift_table, t)
        inside = self.attn(modulate(layer_norm(x), shift, scale).flatten(0, 1)).view(x.shape)
        x = gated_add(x, gate, inside)

        shift, scale, gate = modulation(self.scale_shift_table_temporal, t_temporal)
        along = frames.over_time(self.attn_temp, modulate(layer_norm(x), shift, scale), rotation)
        x = gated_add(x, gate, along)

        x = x + self.cross_attn(x.flatten(1, 2), text, packing).view_as(x)
        return gated_add(x, gate_mlp, self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp)))


class STDiT2(CaptionTransformer):
    """Predicts the noise in a latent, and for IDDPM what it learns of the variance (Open-Sora 1.1).

    Timesteps run from 0 (data) to 1000 (noise). The first `in_channels` of the output are the
    noise; with `pred_sigma` the interpolation between the bounds of the log variance follows.

    Casting the module to half precision keeps rotary frequencies, timesteps and all numbers about
    the clip in fp32; the residual stream has the weights' dtype, also under autocast.
    """

    config: STDiT2Config
    frames_of: FramesOf
    """Swapped by sequence parallelism."""

    def __init__(self, config: STDiT2Config, generator: torch.Generator | None = None) -> None:
        """
        Args:
            config: its size.
            generator: for the initial values; None: PyTorch's own.
        """
        super().__init__()
        self.config = config
        self.frames_of = all_at_hand
        dim = config.hidden_size
        self.rope = RotaryEmbedding(config.head_dim)
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, dim)
        self.t_embedder = ScalarEmbedder(dim)
        self.csize_embedder = ScalarEmbedder(dim // 3)
        self.ar_embedder = ScalarEmbedder(dim // 3)
        self.fl_embedder = ScalarEmbedder(dim)
        self.fps_embedder = ScalarEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.t_block_temp = nn.Sequential(nn.SiLU(), Linear(dim, 3 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.model_max_length)
        self.blocks = nn.ModuleList(STDiT2Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, math.prod(config.patch_size), config.out_channels)
        if config.freeze_y_embedder:
            self.y_embedder.requires_grad_(False)
        initialise(self, generator)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | PackedText,
        *,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        num_frames: Tensor,
        height: Tensor,
        width: Tensor,
        ar: Tensor,
        fps: Tensor,
    ) -> Tensor:
        """
        Args:
            x: noised latent `[B, C, T, H, W]`; sizes that patches do not divide are padded.
            timestep: `[B]`, 0 (data) to 1000 (noise).
            y: text features `[B, 1, L, caption_channels]`, or what `prepare_text` made of them.
            mask: text tokens to keep, `[B, L]`, True or 1 = keep; a mask of fewer rows is tiled.
                On the CPU it spares a wait for the GPU.
            x_mask: `[B, T]` bool, True = noised frame, False = clean frame (timestep 0).
            num_frames: frames of the video, `[B]`.
            height, width: size of the video in pixels, `[B]`; for positions the first sample's
                count for all.
            ar: height over width, `[B]`.
            fps: frames per second, `[B]`. Of these five, fewer rows are tiled.

        Returns:
            `[B, out_channels, T, H, W]` fp32.

        Raises:
            KinemaError: text features of another width.
        """
        config, dtype, batch = self.config, self.x_embedder.proj.weight.dtype, len(x)
        grid = _, rows, columns = config.token_grid((x.shape[2], x.shape[3], x.shape[4]))
        text = self.pack_text(y, mask)
        frames = self.frames_of(grid[0])
        part = frames.split(x, dim=2, step=config.patch_size[0])
        x_mask = None if x_mask is None else frames.split(x_mask, dim=1)

        def embed(embedder: nn.Module, value: Tensor) -> Tensor:
            out: Tensor = embedder(value)
            return out.repeat(batch // len(value), 1)

        parts = [
            (self.csize_embedder, height),
            (self.csize_embedder, width),
            (self.ar_embedder, ar),
        ]
        size = torch.cat([embed(embedder, value) for embedder, value in parts], dim=-1)
        length = embed(self.fl_embedder, num_frames) + embed(self.fps_embedder, fps)

        t = self.t_embedder(timestep)
        t_spatial = self._through(self.t_block, t + size)
        t_temporal = self._through(self.t_block_temp, t + length)
        t0 = None
        if x_mask is not None:
            t0 = self.t_embedder(torch.zeros_like(timestep))
            noised = x_mask[:, :, None]
            t_spatial = torch.where(noised, t_spatial, self._through(self.t_block, t0 + size))
            t_temporal = torch.where(
                noised, t_temporal, self._through(self.t_block_temp, t0 + length)
            )
            # The last layer knows the size in clean frames only: the weights learned it so.
            t0 = t0 + size

        # fp32 for the sum with positions; then the weights' dtype down the whole residual stream.
        scale = (height[0].float() * width[0].float()).sqrt() / config.input_sq_size
        position = position_embedding(
            config.hidden_size,
            rows,
            columns,
            scale=scale,
            base_size=round((rows * columns) ** 0.5),
        )
        tokens = (self.x_embedder(part.to(dtype)) + position).to(dtype)

        shared = text.packing, t_spatial, t_temporal, self.rope(grid[0]), frames
        for block, text_of_block in zip(self.blocks, text.per_block, strict=True):
            tokens = block(tokens, text_of_block, *shared)

        out = frames.join(self.final_layer(tokens, t, t0, x_mask))
        return unpatchify(out, grid, config.patch_size, x.shape).float()

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
        out: Tensor = self(
            x,
            timestep,
            text,
            mask=mask,
            x_mask=x_mask,
            num_frames=shape.num_frames,
            height=shape.height,
            width=shape.width,
            ar=shape.height / shape.width,
            fps=shape.fps,
        )
        return out

    def _through(self, network: nn.Module, t: Tensor) -> Tensor:
        # fp32 again right after the network: sums and selections of it are not to be rounded.
        out: Tensor = network(t.to(self.x_embedder.proj.weight.dtype))
        return out.float()[:, None]
