"""Where the frames of a clip are while a model runs: the door of sequence parallelism.

Models of the STDiT family ask for their frames here and nowhere else. By default all of them are
at hand and nothing is done; `kinema.parallel.sequence` hands in frames that several processes
share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Frames:
    """The frames of one clip (or of a batch of equally long ones), all at hand."""

    def split(self, x: Tensor, dim: int, step: int = 1) -> Tensor:
        """What is at hand of a tensor about all frames.

        Args:
            x: any tensor.
            dim: its dimension of frames.
            step: entries of that dimension to a frame of the token grid.

        Returns:
            `x`, or a part of it.
        """
        return x

    def join(self, x: Tensor) -> Tensor:
        """All frames, from what is at hand of them: `[B, t, ...]` to `[B, T, ...]`."""
        return x

    def over_time(self, attention: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """Attention among the tokens that lie at the same place of all frames.

        Args:
            attention: takes rows of all T frames, `[N, T, C]`, and `rest`; gives the same shape.
            x: tokens at hand, `[B, t, S, C]`.

        Returns:
            `[B, t, S, C]`.
        """
        by_place = x.transpose(1, 2)
        return attention(by_place.flatten(0, 1), *rest).view(by_place.shape).transpose(1, 2)


FramesOf = Callable[[int], Frames]
"""Gives the frames of a clip whose token grid has that many."""

ALL_AT_HAND = Frames()


def all_at_hand(frames: int) -> Frames:
    """Every frame is here: what models begin with."""
    return ALL_AT_HAND
