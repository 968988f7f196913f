"""Frame masks of training: which latent frames a sample keeps clean, so that the model learns to
continue, to begin, to fill in and to animate an image, besides generating from nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from kinema.diffusion.config import FrameMaskConfig, FrameMaskKind


class Draws(Protocol):
    """Where the random numbers of a mask come from."""

    def unit(self) -> float:
        """Uniform in [0, 1)."""
        ...

    def integer(self, low: int, high: int) -> int:
        """Uniform whole number, both ends included."""
        ...

    def units(self, n: int) -> Tensor:
        """`n` numbers uniform in [0, 1): float32 `[n]`."""
        ...


class GeneratorDraws:
    """Draws from a CPU generator, which the caller keys by (seed, purpose, step)."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def unit(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self._generator))

    def units(self, n: int) -> Tensor:
        return torch.rand(n, generator=self._generator)


def frame_masks(
    config: FrameMaskConfig, batch_size: int, num_frames: int, generator: torch.Generator
) -> Tensor:
    """One mask per sample, each of a kind drawn by the configured ratios.

    Args:
        num_frames: latent frames.
        generator: on the CPU.

    Returns:
        bool `[batch_size, num_frames]`, True = noised; every row has at least one True.
    """
    draws, ratios = GeneratorDraws(generator), config.ratios()
    rows = [
        frame_mask(pick_kind(ratios, draws.unit()), num_frames, draws) for _ in range(batch_size)
    ]
    return torch.stack(rows)


def pick_kind(ratios: Mapping[FrameMaskKind, float], unit: float) -> FrameMaskKind:
    """The kind whose share of [0, 1), shares laid out in the mapping's order, holds `unit`."""
    end = 0.0
    for kind, ratio in ratios.items():
        end += ratio
        if unit < end:
            return kind
    return "identity"


def frame_mask(kind: FrameMaskKind, num_frames: int, draws: Draws) -> Tensor:
    """The mask of one sample.

    `quarter_*` keep 1 to a quarter of the frames clean (one, where a quarter is less than one),
    `image_*` a single one: at a random place, the head, the tail, or head and tail each.
    `interpolate` keeps every other frame; `random` keeps each with one probability between 0.1
    and 0.9. A mask that would leave nothing to predict noises the last frame; a single frame is
    always noised.

    Returns:
        bool `[num_frames]`, True = noised.
    """
    noised = torch.ones(num_frames, dtype=torch.bool)
    if num_frames > 1:
        _MAKE_CLEAN[kind](noised, draws)
        if not noised.any():
            noised[-1] = True
    return noised


def _identity(noised: Tensor, draws: Draws) -> None:
    pass


def _random(noised: Tensor, draws: Draws) -> None:
    clean_share = 0.1 + (0.9 - 0.1) * draws.unit()
    noised[:] = draws.units(len(noised)) > clean_share


def _interpolate(noised: Tensor, draws: Draws) -> None:
    noised[draws.integer(0, 1) :: 2] = False


def _quarter(noised: Tensor, draws: Draws) -> int:
    return draws.integer(1, max(1, len(noised) // 4))


def _image(noised: Tensor, draws: Draws) -> int:
    return 1


_Length = Callable[[Tensor, Draws], int]


def _anywhere(length: _Length) -> Callable[[Tensor, Draws], None]:
    def clean(noised: Tensor, draws: Draws) -> None:
        frames = length(noised, draws)
        start = draws.integer(0, len(noised) - frames)
        noised[start : start + frames] = False

    return clean


def _ends(length: _Length, *, head: bool, tail: bool) -> Callable[[Tensor, Draws], None]:
    def clean(noised: Tensor, draws: Draws) -> None:
        frames = length(noised, draws)
        if head:
            noised[:frames] = False
        if tail:
            noised[-frames:] = False

    return clean


_MAKE_CLEAN: dict[FrameMaskKind, Callable[[Tensor, Draws], None]] = {
    "identity": _identity,
    "random": _random,
    "interpolate": _interpolate,
    "quarter_random": _anywhere(_quarter),
    "quarter_head": _ends(_quarter, head=True, tail=False),
    "quarter_tail": _ends(_quarter, head=False, tail=True),
    "quarter_head_tail": _ends(_quarter, head=True, tail=True),
    "image_random": _anywhere(_image),
    "image_head": _ends(_image, head=True, tail=False),
    "image_tail": _ends(_image, head=False, tail=True),
    "image_head_tail": _ends(_image, head=True, tail=True),
}
