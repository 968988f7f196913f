"""STDiT3, the transformer of Open-Sora 1.2: attention in space and in time by turns.

Module and parameter names are those of the released state dict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kinema.models.attention import Packing
from kinema.models.config import STDiT3Config
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
from kinema.models.transformer import CaptionTransformer, ClipShape


class STDiT3Block(nn.Module):
    """Self-attention within frames (or along time), text cross-attention, feed-forward."""

    def __init__(self, config: STDiT3Config, *, temporal: bool) -> None:
        super().__init__()
        dim, heads, backend = config.hidden_size, config.num_heads, config.attention
        self.temporal = temporal
        self.attn = SelfAttention(dim, heads, qk_norm=config.qk_norm, backend=backend)
        self.cross_attn = CrossAttention(dim, heads, backend=backend)
        self.mlp = MLP(dim, config.mlp_size, dim)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(
        self,
        x: Tensor,
        text: Tensor | KeysValues,
        packing: Packing,
        t: Tensor,
        rotation: Tensor | None = None,
        frames: Frames = ALL_AT_HAND,
    ) -> Tensor:
        """
        Args:
            x: tokens `[B, T, S, C]`.
            text: packed text tokens `[sum of lengths, C]`, or their keys and values.
            packing: which text tokens belong to which sample.
            t: modulation `[B, T or 1, 6 * C]` fp32.
            rotation: rotary positions in time, of all frames, for a temporal block.
            frames: what x holds of the clip.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(self.scale_shift_table, t)
        modulated = modulate(layer_norm(x), shift, scale)
        if self.temporal:
            attended = frames.over_time(self.attn, modulated, rotation)
        else:
            attended = self.attn(modulated.flatten(0, 1)).view(x.shape)
        x = gated_add(x, gate, attended)
        x = x + self.cross_attn(x.flatten(1, 2), text, packing).view_as(x)
        return gated_add(x, gate_mlp, self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp)))


class STDiT3(CaptionTransformer):
    """Predicts the velocity of rectified flow for a noised latent (Open-Sora 1.2).

    Timesteps run from 0 (data) to 1000 (noise). The first `in_channels` of the output are the
    velocity, data minus noise: what is added to the latent per unit of decreasing time. With
    `pred_sigma` as many channels again follow, which rectified flow does not use.

    Casting the module to half precision keeps rotary frequencies, timesteps, frame rates and
    sizes in fp32; the residual stream has the weights' dtype, also under autocast.
    """

    config: STDiT3Config
    frames_of: FramesOf
    """Swapped by sequence parallelism."""

    def __init__(self, config: STDiT3Config, generator: torch.Generator | None = None) -> None:
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
        self.fps_embedder = ScalarEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.model_max_length)
        self.spatial_blocks = nn.ModuleList(
            STDiT3Block(config, temporal=False) for _ in range(config.depth)
        )
        self.temporal_blocks = nn.ModuleList(
            STDiT3Block(config, temporal=True) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(dim, math.prod(config.patch_size), config.out_channels)
        if config.freeze_y_embedder or config.skip_y_embedder:
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
        fps: Tensor,
        height: Tensor,
        width: Tensor,
    ) -> Tensor:
        """
        Args:
            x: noised latent `[B, C, T, H, W]`; sizes that patches do not divide are padded.
            timestep: `[B]`, 0 (data) to 1000 (noise).
            y: text features `[B, 1, L, caption_channels]`; with `skip_y_embedder` projected and
                packed ones, `[1, sum of lengths, hidden_size]`.
            mask: text tokens to keep, `[B, L]`, True or 1 = keep; a mask of fewer rows is tiled.
                On the CPU it spares a wait for the GPU. With `skip_y_embedder`: lengths `[B]`.
            x_mask: `[B, T]` bool, True = noised frame, False = clean frame (timestep 0).
            fps: frames per second, `[B]`; fewer rows are tiled.
            height, width: size of the video in pixels, `[B]`; the first sample's count for all.

        Returns:
            `[B, out_channels, T, H, W]` fp32.

        Raises:
            KinemaError: text features of another width.
        """
        dtype = self._dtype
        grid = _, rows, columns = self.config.token_grid((x.shape[2], x.shape[3], x.shape[4]))
        text = self.pack_text(y, mask)
        frames = self.frames_of(grid[0])
        part = frames.split(x, dim=2, step=self.config.patch_size[0])
        x_mask = None if x_mask is None else frames.split(x_mask, dim=1)

        rate = self.fps_embedder(fps).repeat(len(x) // len(fps), 1)
        t = self.t_embedder(timestep) + rate
        t_mlp = self._modulation(t)[:, None]  # [B, 1, 6C]
        t0 = None
        if x_mask is not None:
            t0 = self.t_embedder(torch.zeros_like(timestep)) + rate
            t_mlp = torch.where(x_mask[:, :, None], t_mlp, self._modulation(t0)[:, None])

        # fp32 for the sum with positions; then the weights' dtype down the whole residual stream.
        scale = (height[0].float() * width[0].float()).sqrt() / self.config.input_sq_size
        position = position_embedding(
            self.config.hidden_size,
            rows,
            columns,
            scale=scale,
            base_size=round((rows * columns) ** 0.5),
        )
        tokens = (self.x_embedder(part.to(dtype)) + position).to(dtype)

        rotation = self.rope(grid[0])
        # Of one spatial and one temporal block by turns.
        of_block, packing = iter(text.per_block), text.packing
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, next(of_block), packing, t_mlp)
            tokens = temporal(tokens, next(of_block), packing, t_mlp, rotation, frames)

        out = frames.join(self.final_layer(tokens, t, t0, x_mask))
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
        out: Tensor = self(
            x,
            timestep,
            text,
            mask=mask,
            x_mask=x_mask,
            fps=shape.fps,
            height=shape.height,
            width=shape.width,
        )
        return out

    def cross_attentions(self) -> list[CrossAttention]:
        """See `CaptionTransformer.cross_attentions`."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block.cross_attn for pair in pairs for block in pair]  # type: ignore[misc]

    @property
    def _dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    def _modulation(self, t: Tensor) -> Tensor:
        # fp32 again right after the network: sums and selections of it are not to be rounded.
        return self.t_block(t.to(self._dtype)).float()

    def pack_text(self, text: Tensor | PackedText, mask: Tensor | None) -> PackedText:
        """See `CaptionTransformer.pack_text`; with `skip_y_embedder` text comes projected."""
        if isinstance(text, PackedText) or not self.config.skip_y_embedder:
            return super().pack_text(text, mask)
        assert mask is not None
        tokens = text.flatten(0, 1).to(self._dtype)
        return self._for_all_blocks(tokens, Packing.of(mask.tolist(), text.device))


@torch.no_grad()
def initialise(model: STDiT3, generator: torch.Generator | None = None) -> None:
    """Set every parameter and buffer.

    | what | value |
    |---|---|
    | linear layers | Xavier uniform, bias 0 |
    | patch projection | uniform within 1/sqrt(elements of a patch), bias too |
    | fps embedder | first layer normal with deviation 0.02, second 0 |
    | temporal blocks: both attention outputs, second feed-forward layer | 0 |
    | last linear layer | 0 |
    | modulation tables, stand-in for captions | normal with deviation 1/sqrt(width) |
    | q and k norms | 1 |
    | rotary frequencies | fixed |

    Temporal blocks start as nothing, so that an image model can be the spatial half. As in the
    original, but for the last layer, which the original always took from an image model.

    Args:
        model: a complete model; on the meta device nothing happens.
        generator: where the draws come from; None: PyTorch's own.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (STDiT3Block, FinalLayer)):
            table = module.scale_shift_table
            nn.init.normal_(table, std=table.shape[1] ** -0.5, generator=generator)
    patch, null = model.x_embedder.proj, model.y_embedder.y_embedding
    bound = patch.weight[0].numel() ** -0.5
    for parameter in patch.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    nn.init.normal_(null, std=null.shape[1] ** -0.5, generator=generator)
    first = model.get_parameter("fps_embedder.mlp.0.weight")
    nn.init.normal_(first, std=0.02, generator=generator)

    zero = [model.get_submodule("fps_embedder.mlp.2"), model.final_layer.linear]
    for block in model.modules():
        if isinstance(block, STDiT3Block) and block.temporal:
            zero += [block.attn.proj, block.cross_attn.proj, block.mlp.fc2]
    for layer in zero:
        nn.init.zeros_(layer.get_parameter("weight"))
