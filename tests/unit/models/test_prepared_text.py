"""Text worked out once for all steps: same result, and no block projects it again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.models.build import build_transformer
from kinema.models.config import (
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TransformerConfig,
)
from kinema.models.layers import PackedText
from kinema.models.transformer import CaptionTransformer, ClipShape
from kinema.parallel.recompute import apply_recompute
from tests.unit.device_waits import Questions

FACTS: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 24,
    "num_heads": 2,
    "caption_channels": 12,
    "model_max_length": 6,
}
CONFIGS: list[TransformerConfig] = [
    STDiTConfig(**FACTS),
    STDiT2Config(**FACTS),
    STDiT3Config(**FACTS),
    PixArtConfig(**FACTS),
]
ALL = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.type)
LENGTHS = torch.tensor([[2], [6], [3]])


def randomised(config: TransformerConfig) -> CaptionTransformer:
    generator = torch.Generator().manual_seed(0)
    model = build_transformer(config, generator)
    assert isinstance(model, CaptionTransformer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rope.freqs":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def given(config: TransformerConfig, batch: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    frames = 4 if config.uses_frame_mask else 1
    numbers = (torch.full((batch,), v) for v in (24.0, 32.0, 48.0, 16.0))
    return {
        "x": torch.randn(batch, 4, frames, 4, 6, generator=generator),
        "timestep": torch.linspace(3.0, 990.0, batch),
        "x_mask": None,
        "shape": ClipShape(*numbers),
    }


def text(batch: int = 3) -> Tensor:
    return torch.randn(batch, 1, 6, 12, generator=torch.Generator().manual_seed(2))


def count_calls(model: CaptionTransformer) -> Counter[str]:
    """How often layers that see nothing but the text run."""
    calls: Counter[str] = Counter()

    def watch(name: str) -> None:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda *_: calls.update([name]))

    for name, _ in model.named_modules():
        if name.endswith(("kv_linear", "y_proj")):
            watch(name)
    return calls


@ALL
@pytest.mark.parametrize("mask", [None, torch.arange(6) < LENGTHS], ids=["whole", "uneven"])
@torch.no_grad()
def test_same_result_and_no_text_layer_runs_again(
    config: TransformerConfig, mask: Tensor | None
) -> None:
    model = randomised(config)
    inputs = given(config)
    want = model.predict(text=text(), mask=mask, **inputs)
    calls = count_calls(model)
    prepared = model.prepare_text(text(), mask)
    assert len(calls) == 1 + len(model.cross_attentions())
    assert set(calls.values()) == {1}
    calls.clear()
    for given_mask in (None, mask):  # the prepared text knows its mask
        got = model.predict(text=prepared, mask=given_mask, **inputs)
        assert torch.equal(got, want)
    assert not calls
    again = model.prepare_text(text().flip(0), mask)
    assert not torch.equal(model.predict(text=again, mask=None, **inputs), want)


@ALL
@torch.no_grad()
def test_a_step_asks_the_device_nothing(config: TransformerConfig) -> None:
    model, inputs = randomised(config), given(config)
    prepared = model.prepare_text(text(), torch.arange(6) < LENGTHS)
    if config.uses_frame_mask:
        inputs["x_mask"] = torch.tensor([[False, True, True, False]]).expand(3, 4)
    with Questions() as questions:
        model.predict(text=prepared, mask=None, **inputs)
    assert questions.count == 0


@ALL
@torch.no_grad()
def test_mask_of_fewer_rows_is_tiled(config: TransformerConfig) -> None:
    """Under guidance the half without a caption keeps the lengths of the half with one."""
    model, inputs = randomised(config), given(config, batch=2)
    inputs["x"], inputs["timestep"] = (torch.cat([inputs[k]] * 2) for k in ("x", "timestep"))
    inputs["shape"] = inputs["shape"].repeat(2)
    both = torch.cat([text(2), model.null_text(2)])
    mask = torch.arange(6) < torch.tensor([[2], [5]])
    prepared = model.prepare_text(both, mask)
    assert prepared.packing.lengths == (2, 5, 2, 5)
    want = model.predict(text=both, mask=mask, **inputs)
    assert torch.equal(model.predict(text=prepared, mask=mask, **inputs), want)


@ALL
@torch.no_grad()
def test_half_precision(config: TransformerConfig) -> None:
    model, inputs = randomised(config).to(torch.bfloat16), given(config)
    prepared = model.prepare_text(text(), None)
    assert all(k.dtype == v.dtype == torch.bfloat16 for k, v in prepared.per_block)
    want = model.predict(text=text(), mask=None, **inputs)
    assert torch.equal(model.predict(text=prepared, mask=None, **inputs), want)


@ALL
def test_gradients_reach_the_text_layers(config: TransformerConfig) -> None:
    model, other = randomised(config), randomised(config)
    mask = torch.arange(6) < LENGTHS
    model.predict(text=text(), mask=mask, **given(config)).square().mean().backward()
    apply_recompute(other)
    prepared = other.prepare_text(text(), mask)
    other.predict(text=prepared, mask=None, **given(config)).square().mean().backward()
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        if parameter.grad is not None:
            assert same.grad is not None, name
            torch.testing.assert_close(same.grad, parameter.grad, msg=name)


@torch.no_grad()
def test_text_that_comes_projected_and_packed() -> None:
    config = STDiT3Config(**FACTS, skip_y_embedder=True)
    model, inputs = randomised(config), given(config)
    packed = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([2, 4, 1])
    prepared = model.prepare_text(packed, lengths)
    want = model.predict(text=packed, mask=lengths, **inputs)
    assert torch.equal(model.predict(text=prepared, mask=None, **inputs), want)


def test_prepared_twice_is_prepared_once() -> None:
    model = randomised(CONFIGS[0])
    prepared = model.prepare_text(text(), None)
    calls = count_calls(model)
    assert isinstance(model.pack_text(prepared, None), PackedText)
    assert not calls


@ALL
def test_features_of_another_encoder(config: TransformerConfig) -> None:
    with pytest.raises(KinemaError, match="7 wide, the model takes 12"):
        randomised(config).prepare_text(torch.zeros(1, 1, 6, 7), None)
