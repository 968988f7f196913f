"""STDiT, the transformer of Open-Sora 1.0: each block attends within frames, then along time.

Module and parameter names are those of the released state dict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kinema.models.attention import Packing
from kinema.models.config import STDiTConfig
from kinema.models.embedding import Linear, PatchEmbed3D, ScalarEmbedder
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
from kinema.models.sincos import spatial_table, temporal_table
from kinema.models.transformer import CaptionTransformer, ClipShape

NARROW = (
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "t_block.1",
    "t_block_temp.1",
    "y_embedder.y_proj.fc1",
    "y_embedder.y_proj.fc2",
)
"""Layers of STDiT and STDiT2 whose weights start narrow."""


class STDiTBlock(nn.Module):
    """Attention within frames, along time, and to the text; feed-forward."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        dim, heads, backend = config.hidden_size, config.num_heads, config.attention
        self.attn = SelfAttention(dim, heads, qk_norm=False, backend=backend)
        self.attn_temp = SelfAttention(dim, heads, qk_norm=False, backend=backend)
        self.cross_attn = CrossAttention(dim, heads, backend=backend)
        self.mlp = MLP(dim, config.mlp_size, dim)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(
        self,
        x: Tensor,
        text: Tensor | KeysValues,
        packing: Packing,
        t: Tensor,
        t_noised: Tensor,
        places: Tensor | None = None,
        frames: Frames = ALL_AT_HAND,
    ) -> Tensor:
        """
        Args:
            x: tokens `[B, T, S, C]`.
            text: packed text tokens `[sum of lengths, C]`, or their keys and values.
            packing: which text tokens belong to which sample.
            t: modulation `[B, T or 1, 6 * C]` fp32.
            t_noised: the same of the timestep itself, `[B, 1, 6 * C]`, whatever frames are clean.
            places: positions in time `[T, C]` fp32, for the first block.
            frames: what x holds of the clip.
        """
        table = self.scale_shift_table
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(table, t)
        inside = self.attn(modulate(layer_norm(x), shift, scale).flatten(0, 1)).view(x.shape)
        x = gated_add(x, gate, inside)

        # Along time the weights learned to do without a norm, and with the gate of noised frames
        # everywhere.
        gate = modulation(table, t_noised)[2]
        placed = x if places is None else (x + places[:, None]).to(x.dtype)
        x = gated_add(x, gate, frames.over_time(self.attn_temp, placed))

        x = x + self.cross_attn(x.flatten(1, 2), text, packing).view_as(x)
        return gated_add(x, gate_mlp, self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp)))


class STDiT(CaptionTransformer):
    """Predicts the noise in a latent, and for IDDPM what it learns of the variance (Open-Sora 1.0).

    Timesteps run from 0 (data) to 1000 (noise). The first `in_channels` of the output are the
    noise; with `pred_sigma` the interpolation between the bounds of the log variance follows.
    Frame masks are those that 1.1 and 1.2 added to this class.

    Position tables are computed for the size at hand; files carry those of `config.input_size`.
    Casting the module to half precision keeps timesteps and positions in fp32; the residual
    stream has the weights' dtype, also under autocast.
    """

    config: STDiTConfig
    frames_of: FramesOf
    """Swapped by sequence parallelism."""

    def __init__(self, config: STDiTConfig, generator: torch.Generator | None = None) -> None:
        """
        Args:
            config: its size.
            generator: for the initial values; None: PyTorch's own.
        """
        super().__init__()
        self.config = config
        self.frames_of = all_at_hand
        dim = config.hidden_size
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, dim)
        self.t_embedder = ScalarEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.model_max_length)
        self.blocks = nn.ModuleList(STDiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, math.prod(config.patch_size), config.out_channels)
        initialise(self, generator)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | PackedText,
        *,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: noised latent `[B, C, T, H, W]`; sizes that patches do not divide are padded.
            timestep: `[B]`, 0 (data) to 1000 (noise).
            y: text features `[B, 1, L, caption_channels]`, or what `prepare_text` made of them.
            mask: text tokens to keep, `[B, L]`, True or 1 = keep; a mask of fewer rows is tiled.
                On the CPU it spares a wait for the GPU.
            x_mask: `[B, T]` bool, True = noised frame, False = clean frame (timestep 0).

        Returns:
            `[B, out_channels, T, H, W]` fp32.

        Raises:
            KinemaError: text features of another width.
        """
        config, dtype = self.config, self.x_embedder.proj.weight.dtype
        grid = config.token_grid((x.shape[2], x.shape[3], x.shape[4]))
        text = self.pack_text(y, mask)
        frames = self.frames_of(grid[0])
        part = frames.split(x, dim=2, step=config.patch_size[0])
        x_mask = None if x_mask is None else frames.split(x_mask, dim=1)

        t = self.t_embedder(timestep)
        t_mlp = t_noised = self._modulation(t)
        t0 = None
        if x_mask is not None:
            t0 = self.t_embedder(torch.zeros_like(timestep))
            t_mlp = torch.where(x_mask[:, :, None], t_noised, self._modulation(t0))

        # fp32 for the sum with positions; then the weights' dtype down the whole residual stream.
        position = self._spatial_positions(grid[1], grid[2], x.device)
        tokens = (self.x_embedder(part.to(dtype)) + position).to(dtype)

        positions = self._temporal_positions(grid[0], x.device)
        places: Tensor | None = frames.split(positions, dim=0)
        for block, text_of_block in zip(self.blocks, text.per_block, strict=True):
            tokens = block(tokens, text_of_block, text.packing, t_mlp, t_noised, places, frames)
            places = None  # only the first block is told

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
        """See `Transformer.predict`; the shape is not used."""
        out: Tensor = self(x, timestep, text, mask=mask, x_mask=x_mask)
        return out

    def recomputed_tensors(self) -> dict[str, Tensor]:
        """See `Transformer.recomputed_tensors`: `[1, S, C]` and `[1, T, C]`."""
        frames, rows, columns = self.config.token_grid(self.config.input_size)
        cpu = torch.device("cpu")
        return {
            "pos_embed": self._spatial_positions(rows, columns, cpu)[None],
            "pos_embed_temporal": self._temporal_positions(frames, cpu)[None],
        }

    def _spatial_positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        dim, scale = self.config.hidden_size, self.config.space_scale
        return spatial_table(dim, rows, columns, scale=scale, device=device)

    def _temporal_positions(self, frames: int, device: torch.device) -> Tensor:
        dim, scale = self.config.hidden_size, self.config.time_scale
        return temporal_table(dim, frames, scale=scale, device=device)

    def _modulation(self, t: Tensor) -> Tensor:
        # fp32 again right after the network: sums and selections of it are not to be rounded.
        return self.t_block(t.to(self.x_embedder.proj.weight.dtype)).float()[:, None]


@torch.no_grad()
def initialise(model: CaptionTransformer, generator: torch.Generator | None = None) -> None:
    """Set every parameter and buffer of STDiT or STDiT2.

    | what | value |
    |---|---|
    | linear layers | Xavier uniform, bias 0 |
    | timestep embedder, the networks after it, caption projection | normal, deviation 0.02 |
    | patch projection | Xavier uniform; bias uniform within 1/sqrt(elements of a patch) |
    | outputs of attention in time and to the text, last linear layer | 0 |
    | modulation tables, stand-in for captions | normal with deviation 1/sqrt(width) |
    | q and k norms | 1 |
    | rotary frequencies | fixed |

    As in the original. Attention in time starts as nothing, so that a block starts as one of an
    image model. 1.2 does this otherwise: its temporal blocks are nothing as a whole, spatial
    blocks attend to the text from the start, and what is 0.02 here is Xavier uniform there.

    Args:
        model: a complete model; on the meta device nothing happens.
        generator: where the draws come from; None: PyTorch's own.
    """
    layers = dict(model.named_modules())
    for layer in layers.values():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
    for name in NARROW:
        if name in layers:
            nn.init.normal_(layers[name].get_parameter("weight"), std=0.02, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_temp.proj.weight", "cross_attn.proj.weight")):
            nn.init.zeros_(parameter)
        elif "scale_shift_table" in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
    nn.init.zeros_(model.get_parameter("final_layer.linear.weight"))

    patch, null = layers["x_embedder.proj"], model.y_embedder.y_embedding
    weight, bias = patch.get_parameter("weight"), patch.get_parameter("bias")
    nn.init.xavier_uniform_(weight.view(len(weight), -1), generator=generator)
    bound = weight[0].numel() ** -0.5
    nn.init.uniform_(bias, -bound, bound, generator=generator)
    nn.init.normal_(null, std=null.shape[1] ** -0.5, generator=generator)
