from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.training.ema import EMA


class Model(nn.Module):
    table: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=dtype)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.pos_embed = nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.ones(2))


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_thousand_updates_follow_the_closed_form(dtype: torch.dtype) -> None:
    # Weights that jump from 0 to 1: after n updates the average is 1 - decay^n.
    model = Model(dtype)
    fill(model, 0.0)
    ema = EMA(model, 0.9999)
    fill(model, 1.0)
    for n in range(1, 10_001):
        ema.update(model)
        if n in (1, 100, 10_000):
            weight = ema.state_dict()["layer.weight"]
            assert weight.dtype == torch.float32
            want = torch.full_like(weight, 1.0 - 0.9999**n)
            assert torch.allclose(weight, want, rtol=2e-4, atol=0.0), n


def test_what_is_not_trained_stays() -> None:
    model = Model()
    ema = EMA(model, 0.5)
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    fill(model, 3.0)
    ema.update(model)
    after = ema.state_dict()
    assert after.keys() == model.state_dict().keys()
    for name in ("frozen", "pos_embed", "table"):
        assert torch.equal(after[name], before[name])
    assert torch.allclose(after["layer.bias"], (before["layer.bias"] + 3.0) / 2)


def test_decay_zero_follows_exactly() -> None:
    model = Model()
    ema = EMA(model, 0.0)
    fill(model, 0.3)
    ema.update(model)
    assert torch.equal(ema.state_dict()["layer.weight"], model.layer.weight)


def test_the_average_shares_no_memory_with_the_model() -> None:
    model = Model()
    ema = EMA(model, 0.9)
    fill(model, 7.0)
    assert not any((v == 7.0).any() for v in ema.state_dict().values())


def test_it_goes_on_after_a_load_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = Model()
    ema = EMA(model, 0.99)
    saved: dict[str, Tensor] = {}
    weights = [torch.randn(2, 3) for _ in range(10)]
    for i, value in enumerate(weights):
        if i == 5:
            saved = {k: v.clone() for k, v in ema.state_dict().items()}
        with torch.no_grad():
            model.layer.weight.copy_(value)
        ema.update(model)

    again = EMA(Model(), 0.99)
    for name, value in again.state_dict().items():
        value.copy_(saved[name])
    for value in weights[5:]:
        with torch.no_grad():
            model.layer.weight.copy_(value)
        again.update(model)
    for name, value in ema.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_decay_out_of_range_is_refused() -> None:
    with pytest.raises(KinemaError, match="decay is 1"):
        EMA(Model(), 1.0)
