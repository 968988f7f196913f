"""Sinusoids of timesteps, whatever the CPU; rotation, with and without complex numbers."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from kinema.models.config import FREQUENCY_CHANNELS
from kinema.models.embedding import RotaryEmbedding, rotate, sinusoids


def frequency(step: int, channels: int) -> tuple[float, Fraction]:
    """The fp32 number nearest to a frequency, and how far below the exact value it is, in units in
    the last place; worked out without torch's `exp`."""
    getcontext().prec = 40
    exponent = torch.tensor(-math.log(10000), dtype=torch.float32) * step / (channels // 2)
    exact = Fraction(Decimal(exponent.item()).exp())
    near = torch.tensor(float(exact), dtype=torch.float32)
    unit = Fraction(near.nextafter(torch.tensor(2.0)).item()) - Fraction(near.item())
    return near.item(), (exact - Fraction(near.item())) / unit


def taken(channels: int) -> Tensor:
    """Frequencies, from the sines of a number so small that they are its products with them."""
    tiny = 2.0**-60
    return sinusoids(torch.tensor([tiny]), channels)[0, channels // 2 :] / tiny


@pytest.mark.parametrize("channels", [FREQUENCY_CHANNELS, 64])
def test_frequencies_are_exact_but_for_two(channels: int) -> None:
    other = {}
    for step, got in enumerate(taken(channels).tolist()):
        nearest, below = frequency(step, channels)
        assert abs(below) <= Fraction(1, 2)
        if got != nearest:
            assert got == torch.tensor(nearest).nextafter(torch.tensor(2.0)).item()
            other[step] = float(1 - below)
    # The recorded original rounds these up, hardly farther from the exact value.
    assert sorted(other) == ([13, 44] if channels == FREQUENCY_CHANNELS else [])
    assert all(distance < 0.53 for distance in other.values())


def test_timesteps_that_half_precision_cannot_tell_apart() -> None:
    a, b = sinusoids(torch.tensor([999, 1000]))
    assert (a - b).abs().max() > 0.1
    values = torch.tensor([0.0, 17.25, 1000.0])
    got = sinusoids(values)
    assert got.shape == (3, FREQUENCY_CHANNELS)
    assert got.dtype == torch.float32
    angles = (values[:, None] * taken(FREQUENCY_CHANNELS)).double()
    want = torch.cat([angles.cos(), angles.sin()], dim=-1).float()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_sinusoids_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert sinusoids(torch.empty(3)).is_meta


def test_rotation_is_by_the_angle_of_the_place() -> None:
    rope = RotaryEmbedding(8)
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    got = rotate(x, rope(5))
    angles = torch.arange(5.0)[:, None] * rope.freqs
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    torch.testing.assert_close(got[..., ::2], even * cos - odd * sin)
    torch.testing.assert_close(got[..., 1::2], even * sin + odd * cos)
    assert rotate(x.bfloat16(), rope(5)).dtype == torch.float32


def test_compiled_rotation_is_the_same() -> None:
    """Graphs have no complex numbers, so they take another way."""
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rotation = RotaryEmbedding(8)(5)
    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    want, got = rotate(x, rotation), compiled(x, rotation)
    torch.testing.assert_close(got, want)
    weights = torch.arange(want.numel()).view_as(want) / want.numel()
    grads = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (want, got)]
    torch.testing.assert_close(*grads)
