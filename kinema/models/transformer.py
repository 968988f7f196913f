"""What training and generation know of a transformer, whichever generation it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.attention import Packing
from kinema.models.config import (
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TransformerConfig,
)
from kinema.models.layers import CaptionEmbedder, CrossAttention, PackedText


@dataclass(frozen=True)
class ClipShape:
    """What a model may be told about each clip of a batch, fp32 `[B]` each, on its device."""

    fps: Tensor
    """Frames per second."""
    height: Tensor
    """Pixels."""
    width: Tensor
    """Pixels."""
    num_frames: Tensor
    """Frames of the video (not of the latent)."""

    def repeat(self, times: int) -> ClipShape:
        """The batch that many times over, as guidance needs it."""
        return ClipShape(*(v.repeat(times) for v in self._values()))

    def _values(self) -> tuple[Tensor, ...]:
        return self.fps, self.height, self.width, self.num_frames


class Transformer(nn.Module, ABC):
    """Base of all diffusion transformers.

    Each has a `forward` that takes exactly what it uses; `predict` is the same call with the
    arguments that all share, so that callers need not know which model they hold.
    """

    config: TransformerConfig

    @abstractmethod
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
        """Call `self(...)` with what this model takes of the arguments.

        Args:
            x: noised latent `[B, C, T, H, W]`.
            timestep: `[B]`, 0 (data) to 1000 (noise).
            text: features as the text encoder gives them (`TextFeatures.y`), or what
                `prepare_text` made of them.
            mask: text tokens to keep, bool `[B, L]` (on the CPU), or None; not used with prepared
                text.
            x_mask: `[B, T]` bool, True = noised frame; only if `config.uses_frame_mask`.
            shape: of the clips.

        Returns:
            fp32 `[B, out_channels, T, H, W]`.
        """

    @abstractmethod
    def prepare_text(self, text: Tensor, mask: Tensor | None) -> Any:
        """All that depends on the text alone (projection, keys and values of every block), worked
        out once for all steps; `predict` takes it in place of features."""

    @abstractmethod
    def null_text(self, n: int) -> Tensor:
        """The learned stand-in for "no caption" (or no class), for guidance, in the form of the
        text encoder's features for `n` captions."""

    @abstractmethod
    def drop_text(self, text: Tensor, drop: Tensor) -> Tensor:
        """Replace features by the learned stand-in where `drop` (`[B]` bool) is True."""

    def recomputed_tensors(self) -> dict[str, Tensor]:
        """Tensors that files released for this model carry and that the model computes itself
        (position tables), by their name there, fp32 on the CPU."""
        return {}


class CaptionTransformer(Transformer):
    """Base of those whose tokens attend to the tokens of a caption."""

    config: STDiTConfig | STDiT2Config | STDiT3Config | PixArtConfig
    y_embedder: CaptionEmbedder
    blocks: nn.ModuleList

    def cross_attentions(self) -> list[CrossAttention]:
        """All that attend to the text, in the order of the blocks."""
        return [block.cross_attn for block in self.blocks]  # type: ignore[misc]

    def prepare_text(self, text: Tensor, mask: Tensor | None) -> PackedText:
        """Projected and packed text, and the keys and values of every block.

        Runs each block's `kv_linear` outside of the block, so its weights have to be in place.

        Args:
            text: features `[B, 1, L, caption_channels]`.
            mask: tokens to keep, `[B, L]`, True or 1 = keep; one of fewer rows is tiled. On the
                CPU it spares a wait for the GPU.

        Raises:
            KinemaError: features of another width.
        """
        packed = self.pack_text(text, mask)
        attentions = zip(self.cross_attentions(), packed.per_block, strict=True)
        prepared = tuple(
            attention.keys_values(tokens) if isinstance(tokens, Tensor) else tokens
            for attention, tokens in attentions
        )
        return PackedText(prepared, packed.packing)

    def pack_text(self, text: Tensor | PackedText, mask: Tensor | None) -> PackedText:
        """Text as the blocks take it; what `prepare_text` gave passes as it is."""
        if isinstance(text, PackedText):
            return text
        batch, _, length, channels = text.shape
        if channels != self.config.caption_channels:
            raise KinemaError(
                f"text is {channels} wide, the model takes {self.config.caption_channels}",
                where="model.caption_channels",
                hint="use the text encoder (or embeddings) that the model was made for",
            )
        tokens = text.flatten(0, 2)
        lengths = [length] * batch
        if mask is not None:
            assert batch % mask.shape[0] == 0
            assert mask.shape[1] == length
            keep = (mask.cpu() != 0).repeat(batch // mask.shape[0], 1)
            lengths = keep.sum(dim=1).tolist()
            if sum(lengths) < keep.numel():
                # Packed before the projection, so that padding costs nothing.
                kept = keep.flatten().nonzero().squeeze(1)
                tokens = tokens[kept.to(text.device, non_blocking=True)]
        tokens = self.y_embedder(tokens.to(self.y_embedder.y_proj.fc1.weight.dtype))
        return self._for_all_blocks(tokens, Packing.of(lengths, text.device))

    def _for_all_blocks(self, tokens: Tensor, packing: Packing) -> PackedText:
        return PackedText((tokens,) * len(self.cross_attentions()), packing)

    def null_text(self, n: int) -> Tensor:
        """The learned stand-in for a caption, for guidance: `[n, 1, L, caption_channels]`."""
        return self.y_embedder.y_embedding.expand(n, 1, -1, -1)

    def drop_text(self, text: Tensor, drop: Tensor) -> Tensor:
        """Replace captions by the learned stand-in; masks stay as they are.

        Args:
            text: features `[B, 1, L, caption_channels]`, L at most `model_max_length`.
            drop: `[B]` bool, True = replace.
        """
        return self.y_embedder.drop(text, drop)
