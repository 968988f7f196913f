"""DiT and Latte, the class- and text-conditional models beside Open-Sora 1.0.

DiT (arXiv:2212.09748) attends over all tokens of a clip; Latte (arXiv:2401.03048) within frames
and along time by turns. Both learn about timestep and condition through adaptive layer norm only.

Module and parameter names are those of the state dicts that Open-Sora 1.0 writes. Files of the
first authors differ from them as `checkpoint/released_names.py` says.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.config import DiTConfig, LatteConfig
from kinema.models.embedding import Linear, PatchEmbed3D, ScalarEmbedder
from kinema.models.layers import MLP, SelfAttention, gated_add, layer_norm, modulate, unpatchify
from kinema.models.sincos import spatial_table, temporal_table
from kinema.models.transformer import ClipShape, Transformer


@dataclass(frozen=True)
class EmbeddedCondition:
    """A class or caption as the blocks take it; made by `prepare_text`."""

    vectors: Tensor
    """`[B, hidden_size]` fp32."""


class Embedding(nn.Embedding):
    """A table whose values its model sets, once, when it is complete."""

    def reset_parameters(self) -> None:
        """Nothing, as for `Linear`."""


class LabelEmbedder(nn.Module):
    """A learned vector for each class, and one behind them for "no class"."""

    def __init__(self, num_classes: int, dim: int, *, with_null: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.with_null = with_null
        self.embedding_table = Embedding(num_classes + with_null, dim)

    def forward(self, y: Tensor) -> Tensor:
        """Numbers of classes, int `[B]`, to `[B, dim]` fp32.

        Those that come on a GPU were checked before, as `ClassTextEncoder` does: one too large
        ends the process there.
        """
        if y.is_floating_point() or y.ndim != 1:
            raise KinemaError(
                f"the model takes one class number for each sample, not {tuple(y.shape)} {y.dtype}",
                where="model.condition",
                hint="use text type `classes`",
            )
        if y.device.type == "cpu":  # on a GPU that would be a wait in every training step
            self._require_known(y)
        # The sum with the timestep feeds every block: fp32.
        return self.embedding_table(y).float()

    def null(self, n: int) -> Tensor:
        if not self.with_null:
            raise KinemaError(
                "the model was trained without dropping classes: there is no guidance for it",
                where="model.class_dropout_prob",
                hint="generate with a guidance scale of 1",
            )
        return torch.full((n,), self.num_classes, device=self.embedding_table.weight.device)

    def drop(self, y: Tensor, drop: Tensor) -> Tensor:
        return torch.where(drop, self.null(len(y)).to(y), y)

    def _require_known(self, y: Tensor) -> None:
        for number in y.tolist():
            if not 0 <= number < self.embedding_table.num_embeddings:
                raise KinemaError(
                    f"class {number} does not exist; the model knows {self.num_classes} classes, "
                    f"0 to {self.num_classes - 1}",
                    where="class",
                )


class PooledCaptionEmbedder(nn.Module):
    """Projects one vector per caption; holds the stand-in for "no caption"."""

    y_embedding: Tensor

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.y_proj = MLP(in_channels, dim, dim)
        self.register_buffer("y_embedding", torch.empty(1, in_channels))

    def forward(self, y: Tensor) -> Tensor:
        """`[B, in_channels]`, with any axes of one between, to `[B, dim]` fp32."""
        channels = self.y_embedding.shape[1]
        if y.shape[-1] != channels or y[0].numel() != channels:
            raise KinemaError(
                f"text is {list(y.shape[1:])} for each sample; the model takes one vector of "
                f"{channels}",
                where="model.caption_channels",
                hint="use text type `clip` with the encoder that the model was made for",
            )
        vectors = y.flatten(1).to(self.y_proj.fc1.weight.dtype)
        # As for classes: summed in fp32.
        return self.y_proj(vectors).float()

    def null(self, n: int) -> Tensor:
        return self.y_embedding.expand(n, 1, -1)

    def drop(self, y: Tensor, drop: Tensor) -> Tensor:
        rows = drop.view(-1, *[1] * (y.ndim - 1))
        return torch.where(rows, self.y_embedding.to(y.dtype), y)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, both under adaptive layer norm with gates."""

    def __init__(self, config: DiTConfig | LatteConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.attn = SelfAttention(dim, config.num_heads, qk_norm=False, backend=config.attention)
        self.mlp = MLP(dim, config.mlp_size, dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """
        Args:
            x: `[B, R, L, C]`; the L tokens of each of R rows attend to one another.
            condition: timestep and class (or caption) together, `[B, C]` fp32.
        """
        vectors = _vectors(self.adaLN_modulation, condition, x, 6)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors
        rows = modulate(layer_norm(x), shift, scale).flatten(0, 1)
        x = gated_add(x, gate, self.attn(rows).view_as(x))
        return gated_add(x, gate_mlp, self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """From tokens to patches of the output."""

    def __init__(self, dim: int, patch_elements: int, out_channels: int) -> None:
        super().__init__()
        self.linear = Linear(dim, patch_elements * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens `[B, R, L, C]`, condition `[B, C]` fp32."""
        shift, scale = _vectors(self.adaLN_modulation, condition, x, 2)
        return self.linear(modulate(layer_norm(x), shift, scale))


def _vectors(network: nn.Module, condition: Tensor, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Modulation vectors `[B, 1, 1, C]`, in fp32 until they meet the tokens."""
    vectors = network(condition.to(x.dtype)).float()
    return vectors[:, None, None].chunk(parts, dim=-1)


class _DiTBase(Transformer):
    """What DiT and Latte have in common: all but the way through the blocks.

    Predicts the noise of IDDPM, then as many channels for its variance (`pred_sigma`). Timesteps
    run from 0 (data) to 1000 (noise). Casting to half precision keeps timesteps, positions and
    the sum of timestep and condition in fp32.
    """

    config: DiTConfig | LatteConfig

    def __init__(
        self, config: DiTConfig | LatteConfig, generator: torch.Generator | None = None
    ) -> None:
        """
        Args:
            config: its size.
            generator: for the initial values; None: PyTorch's own.
        """
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.x_embedder = PatchEmbed3D(config.patch_size, config.in_channels, dim)
        self.y_embedder: LabelEmbedder | PooledCaptionEmbedder
        if config.num_classes is None:
            self.y_embedder = PooledCaptionEmbedder(config.caption_channels, dim)
        else:
            with_null = config.class_dropout_prob > 0
            self.y_embedder = LabelEmbedder(config.num_classes, dim, with_null=with_null)
        self.t_embedder = ScalarEmbedder(dim)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(dim, math.prod(config.patch_size), config.out_channels)
        initialise(self, generator)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor | EmbeddedCondition) -> Tensor:
        """
        Args:
            x: noised latent `[B, C, T, H, W]`; sizes that patches do not divide are padded.
            timestep: `[B]`, 0 (data) to 1000 (noise).
            y: numbers of classes, int `[B]`; or pooled vectors of captions,
                `[B, 1, caption_channels]`; or what `prepare_text` made of either.

        Returns:
            `[B, out_channels, T, H, W]` fp32.

        Raises:
            KinemaError: a class that does not exist (on the CPU); text features of another kind or
                width.
        """
        if not isinstance(y, EmbeddedCondition):
            y = self.prepare_text(y)
        grid = self.config.token_grid((x.shape[2], x.shape[3], x.shape[4]))
        dtype = self.x_embedder.proj.weight.dtype
        # fp32 for the sum with positions; then the weights' dtype down the whole residual stream.
        table = spatial_table(self.config.hidden_size, *grid[1:], device=x.device)
        tokens = self.x_embedder(x.to(dtype)) + table
        condition = self.t_embedder(timestep) + y.vectors
        tokens = self._through_blocks(tokens, condition, dtype)
        out = self.final_layer(tokens, condition)
        return unpatchify(out, grid, self.config.patch_size, x.shape).float()

    @abstractmethod
    def _through_blocks(self, x: Tensor, condition: Tensor, dtype: torch.dtype) -> Tensor:
        """Add positions in time and run all blocks.

        Args:
            x: tokens with their places in a frame, `[B, T, S, C]` fp32.
            condition: `[B, C]` fp32.
            dtype: of the residual stream.

        Returns:
            `[B, T, S, C]`.
        """

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Any,
        *,
        mask: Tensor | None,
        x_mask: Tensor | None,
        shape: ClipShape,
    ) -> Tensor:
        """See `Transformer.predict`; there are no tokens to mask."""
        assert mask is None
        assert x_mask is None
        out: Tensor = self(x, timestep, text)
        return out

    def prepare_text(self, text: Tensor, mask: Tensor | None = None) -> EmbeddedCondition:
        """The embedded class or caption, which is the same at every step."""
        assert mask is None
        return EmbeddedCondition(self.y_embedder(text))

    def null_text(self, n: int) -> Tensor:
        """For guidance: the number behind the last class, int64 `[n]`; or the stand-in for a
        caption, `[n, 1, caption_channels]`.

        Raises:
            KinemaError: the model never learned to do without a class.
        """
        return self.y_embedder.null(n)

    def drop_text(self, text: Tensor, drop: Tensor) -> Tensor:
        """See `Transformer.drop_text`."""
        return self.y_embedder.drop(text, drop)

    def recomputed_tensors(self) -> dict[str, Tensor]:
        """See `Transformer.recomputed_tensors`."""
        frames, rows, columns = self.config.token_grid(self.config.input_size)
        dim, cpu = self.config.hidden_size, torch.device("cpu")
        return {
            "pos_embed_spatial": spatial_table(dim, rows, columns, device=cpu)[None],
            "pos_embed_temporal": temporal_table(dim, frames, device=cpu)[None],
        }


class DiT(_DiTBase):
    """DiT: every token attends to all tokens of the clip."""

    config: DiTConfig

    def _through_blocks(self, x: Tensor, condition: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.config.no_temporal_pos_emb:
            x = x + temporal_table(x.shape[3], x.shape[1], device=x.device)[:, None]
        tokens = x.to(dtype).flatten(1, 2)[:, None]
        for block in self.blocks:
            tokens = block(tokens, condition)
        return tokens.view_as(x)


class Latte(_DiTBase):
    """Latte: blocks of even number attend within a frame, the others along time."""

    config: LatteConfig

    def _through_blocks(self, x: Tensor, condition: Tensor, dtype: torch.dtype) -> Tensor:
        positions = temporal_table(x.shape[3], x.shape[1], device=x.device)
        tokens = x.to(dtype)
        for i, block in enumerate(self.blocks):
            if i % 2 == 0:
                tokens = block(tokens, condition)
                continue
            along_time = tokens.transpose(1, 2)
            if i == 1:  # the first that looks along time
                along_time = (along_time + positions).to(dtype)
            tokens = block(along_time, condition).transpose(1, 2)
        return tokens


@torch.no_grad()
def initialise(model: _DiTBase, generator: torch.Generator | None = None) -> None:
    """Set every parameter and buffer.

    | what | value |
    |---|---|
    | linear layers, patch projection (as a matrix) | Xavier uniform, bias 0 |
    | timestep and caption networks, class vectors | normal with deviation 0.02, bias 0 |
    | modulation layers, last linear layer | 0 |
    | stand-in for captions | normal with deviation 1/sqrt(width) |

    As in DiT: every block starts as nothing.

    Args:
        model: a complete model; on the meta device nothing happens.
        generator: where the draws come from; None: PyTorch's own.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    patch = model.x_embedder.proj
    nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1), generator=generator)
    nn.init.zeros_(patch.bias)

    small: list[Tensor] = [model.get_parameter("t_embedder.mlp.0.weight")]
    small += [model.get_parameter("t_embedder.mlp.2.weight")]
    if isinstance(model.y_embedder, LabelEmbedder):
        small += [model.y_embedder.embedding_table.weight]
    else:
        small += [model.y_embedder.y_proj.fc1.weight, model.y_embedder.y_proj.fc2.weight]
        null = model.y_embedder.y_embedding
        nn.init.normal_(null, std=null.shape[1] ** -0.5, generator=generator)
    for weight in small:
        nn.init.normal_(weight, std=0.02, generator=generator)

    zero = [model.final_layer.linear]
    zero += [m for n, m in model.named_modules() if n.endswith("adaLN_modulation.1")]
    for layer in zero:
        nn.init.zeros_(layer.weight)
