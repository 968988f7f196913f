"""Captions as features: encoded once each, kept small, put together into batches with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.models.text import TextEncoder, TextFeatures
from kinema.models.transformer import Transformer


@dataclass(frozen=True)
class Caption:
    """Features of one caption on the CPU, without the padding behind its last token."""

    y: Tensor
    """`[1, 1, l, D]`, `[1, 1, D]` or a class `[1]`; see `TextFeatures`."""
    mask: Tensor | None
    """`[1, L]` bool, of full length."""

    @classmethod
    def of(cls, features: TextFeatures) -> Caption:
        """Of the features of a single caption."""
        if features.mask is None:
            return cls(features.y, None)
        kept = int(features.mask[0].nonzero().max()) + 1
        return cls(features.y[:, :, :kept].clone(), features.mask)

    def padded(self) -> Tensor:
        """The features as the encoder gave them, zeros where the mask is False."""
        if self.mask is None:
            return self.y
        missing = self.mask.shape[1] - self.y.shape[2]
        return torch.nn.functional.pad(self.y, (0, 0, 0, missing))


def encode(encoder: TextEncoder, texts: Sequence[str]) -> dict[str, Caption]:
    """Features of every different text.

    One at a time: a text encoder's matrix products round differently in batches of other sizes,
    and a caption must not depend on its company.
    """
    return {text: Caption.of(encoder.encode([text])) for text in dict.fromkeys(texts)}


@dataclass(frozen=True)
class GuidedText:
    """The text of a batch, with what guidance leads away from in a second half."""

    y: Tensor
    mask: Tensor | None
    halves: int
    """2 with guidance; 1 where one pass is enough."""

    @classmethod
    def of(
        cls,
        model: Transformer,
        captions: Sequence[Caption],
        negative: Sequence[Caption | None],
        scale: float,
        device: torch.device,
    ) -> GuidedText:
        """
        Args:
            negative: for each caption, what to lead away from; None: the model's learned
                stand-in for no caption.
            scale: of guidance. At 1 the captions alone are enough, at 0 their opposite alone.
        """
        sides = []
        if scale != 0.0:
            sides.append(_join([(c.padded(), c.mask) for c in captions]))
        if scale != 1.0:
            null = model.null_text(1).cpu()
            sides.append(
                _join([_opposite(c, n, null) for c, n in zip(captions, negative, strict=True)])
            )
        y = torch.cat([side[0] for side in sides])
        masks = [side[1] for side in sides if side[1] is not None]
        return cls(y.to(device), torch.cat(masks) if masks else None, len(sides))


def _opposite(
    caption: Caption, negative: Caption | None, null: Tensor
) -> tuple[Tensor, Tensor | None]:
    if negative is not None:
        return negative.padded(), negative.mask
    if caption.mask is not None:
        # The stand-in keeps the caption's length, as released weights were sampled with.
        null = null[:, :, : caption.mask.shape[1]]
    return null.to(caption.y.dtype), caption.mask


def _join(rows: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    masks = [mask for _, mask in rows if mask is not None]
    return torch.cat([y for y, _ in rows]), torch.cat(masks) if masks else None
