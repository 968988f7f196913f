"""STDiT3, the transformer of Open-Sora 1.2: attention in space and in time by turns.

Module and parameter names are those of the released state dict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.attention import Packing
from kinema.models.config import STDiT3Config
from kinema.models.embedding import (
    Linear,
    PatchEmbed3D,
    RotaryEmbedding,
    ScalarEmbedder,
    position_embedding,
)
from kinema.models.layers import (
    MLP,
    CrossAttention,
    SelfAttention,
    gated_add,
    layer_norm,
    modulate,
)
from kinema.models.transformer import ClipShape, Transformer


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
        """See `STDiT3.drop_text`."""
        null = self.y_embedding[: y.shape[2]].to(y.dtype)
        return torch.where(drop[:, None, None, None], null, y)


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
        self, x: Tensor, text: Tensor, packing: Packing, t: Tensor, rotation: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: tokens `[B, T, S, C]`.
            text: packed text tokens `[sum of lengths, C]`.
            packing: which text tokens belong to which sample.
            t: modulation `[B, T or 1, 6 * C]` fp32.
            rotation: rotary positions in time, for a temporal block.
        """
        # Modulation vectors are few: fp32, and rounded only where they meet the tokens.
        vectors = self.scale_shift_table.float() + t.unflatten(-1, (6, -1))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors[:, :, :, None].unbind(2)

        attended = self._attend(modulate(layer_norm(x), shift, scale), rotation)
        x = gated_add(x, gate, attended)
        x = x + self.cross_attn(x.flatten(1, 2), text, packing).view_as(x)
        return gated_add(x, gate_mlp, self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp)))

    def _attend(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """Attention among the tokens of a frame, or of a place over time: `[B, T, S, C]`."""
        x = x.transpose(1, 2) if self.temporal else x
        out = self.attn(x.flatten(0, 1), rotation).view(x.shape)
        return out.transpose(1, 2) if self.temporal else out


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


class STDiT3(Transformer):
    """Predicts the velocity of rectified flow for a noised latent (Open-Sora 1.2).

    Timesteps run from 0 (data) to 1000 (noise). The first `in_channels` of the output are the
    velocity, data minus noise: what is added to the latent per unit of decreasing time. With
    `pred_sigma` as many channels again follow, which rectified flow does not use.

    Casting the module to half precision keeps rotary frequencies, timesteps, frame rates and
    sizes in fp32; the residual stream has the weights' dtype, also under autocast.
    """

    config: STDiT3Config

    def __init__(self, config: STDiT3Config, generator: torch.Generator | None = None) -> None:
        """
        Args:
            config: its size.
            generator: for the initial values; None: PyTorch's own.
        """
        super().__init__()
        self.config = config
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
        y: Tensor,
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
        frames, rows, columns = self.config.token_grid((x.shape[2], x.shape[3], x.shape[4]))
        text, packing = self._encode_text(y, mask, x)

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
        tokens = (self.x_embedder(x.to(dtype)) + position).to(dtype)

        rotation = self.rope(frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            tokens = spatial(tokens, text, packing, t_mlp)
            tokens = temporal(tokens, text, packing, t_mlp, rotation)

        out = self.final_layer(tokens, t, t0, x_mask)
        return self._unpatchify(out, (frames, rows, columns), x.shape).float()

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
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

    def null_text(self, n: int) -> Tensor:
        """The learned stand-in for a caption, for guidance: `[n, 1, L, caption_channels]`."""
        return self.y_embedder.y_embedding.expand(n, 1, -1, -1)

    def drop_text(self, y: Tensor, drop: Tensor) -> Tensor:
        """Replace captions by the learned stand-in; masks stay as they are.

        Args:
            y: text features `[B, 1, L, caption_channels]`, L at most `model_max_length`.
            drop: `[B]` bool, True = replace.
        """
        return self.y_embedder.drop(y, drop)

    @property
    def _dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    def _modulation(self, t: Tensor) -> Tensor:
        # fp32 again right after the network: sums and selections of it are not to be rounded.
        return self.t_block(t.to(self._dtype)).float()

    def _encode_text(self, y: Tensor, mask: Tensor | None, x: Tensor) -> tuple[Tensor, Packing]:
        """Text tokens packed before they are projected, so that padding costs nothing."""
        if self.config.skip_y_embedder:
            assert mask is not None
            return y.flatten(0, 1).to(self._dtype), Packing.of(mask.tolist(), x.device)
        batch, _, length, channels = y.shape
        if channels != self.config.caption_channels:
            raise KinemaError(
                f"text is {channels} wide, the model takes {self.config.caption_channels}",
                where="model.caption_channels",
                hint="use the text encoder (or embeddings) that the model was made for",
            )
        tokens = y.flatten(0, 2)
        lengths = [length] * batch
        if mask is not None:
            assert batch % mask.shape[0] == 0
            assert mask.shape[1] == length
            keep = (mask.cpu() != 0).repeat(batch // mask.shape[0], 1)
            lengths = keep.sum(dim=1).tolist()
            if sum(lengths) < keep.numel():
                kept = keep.flatten().nonzero().squeeze(1)
                tokens = tokens[kept.to(x.device, non_blocking=True)]
        return self.y_embedder(tokens.to(self._dtype)), Packing.of(lengths, x.device)

    def _unpatchify(self, x: Tensor, grid: tuple[int, int, int], shape: torch.Size) -> Tensor:
        """`[B, T, S, patch * C]` to `[B, C, T, H, W]`, cut to the input's size."""
        pt, ph, pw = self.config.patch_size
        frames, rows, columns = grid
        x = x.view(x.shape[0], frames, rows, columns, pt, ph, pw, self.config.out_channels)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
        return x[:, :, : shape[2], : shape[3], : shape[4]]


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
