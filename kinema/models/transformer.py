"""What training and generation know of a transformer, whichever generation it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kinema.models.config import TransformerConfig


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

    def prepare_text(self, text: Tensor, mask: Tensor | None) -> Any:
        """All that depends on the text alone (projection, keys and values of every block), worked
        out once for all steps; `predict` takes it in place of features."""
        raise NotImplementedError

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
