"""Blocks compiled in place: no break in the graph, same numbers, same names."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from kinema.config.errors import KinemaError
from kinema.models.build import build_transformer
from kinema.models.config import (
    DiTConfig,
    LatteConfig,
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TransformerConfig,
)
from kinema.models.transformer import ClipShape, Transformer
from kinema.parallel.compile import MOST_VERSIONS, compile_blocks
from kinema.parallel.recompute import apply_recompute

FACTS: dict[str, Any] = {"depth": 1, "hidden_size": 24, "num_heads": 2}
CAPTION: dict[str, Any] = {"caption_channels": 12, "model_max_length": 6}
CONFIGS: list[TransformerConfig] = [
    STDiTConfig(**FACTS, **CAPTION),
    STDiT2Config(**FACTS, **CAPTION),
    STDiT3Config(**FACTS, **CAPTION),
    PixArtConfig(**FACTS, **CAPTION),
    DiTConfig(**FACTS, condition="label_5"),
    LatteConfig(**FACTS, condition="label_5"),
]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    limit = torch._dynamo.config.recompile_limit
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def randomised(config: TransformerConfig) -> Transformer:
    generator = torch.Generator().manual_seed(0)
    model = build_transformer(config, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rope.freqs":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def predicted(model: Transformer, *, mask: Tensor | None = None, prepared: bool = False) -> Tensor:
    config, generator = model.config, torch.Generator().manual_seed(1)
    frames = 1 if isinstance(config, (PixArtConfig, DiTConfig)) else 3
    text: Any = torch.tensor([1, 4])
    if not isinstance(config, (DiTConfig, LatteConfig)):
        text = torch.randn(2, 1, 6, 12, generator=generator)
    if prepared:
        text = model.prepare_text(text, mask)
    x_mask = None
    if config.uses_frame_mask:
        x_mask = torch.ones(2, frames, dtype=torch.bool)
        x_mask[0, 0] = False
    return model.predict(
        torch.randn(2, 4, frames, 4, 6, generator=generator),
        torch.tensor([10.0, 800.0]),
        text,
        mask=mask,
        x_mask=x_mask,
        shape=ClipShape(*(torch.full((2,), v) for v in (24.0, 32.0, 48.0, 9.0))),
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.type)
def test_one_graph_and_the_same_numbers(config: TransformerConfig) -> None:
    plain = randomised(config)
    compiled = copy.deepcopy(plain)
    apply_recompute(compiled)
    names = list(compiled.state_dict())
    assert compile_blocks(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == names

    want, got = predicted(plain), predicted(compiled)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    want.square().mean().backward()
    got.square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            assert q.grad is not None, name
            torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("config", CONFIGS[:4], ids=lambda c: c.type)
@torch.no_grad()
def test_prepared_texts_of_uneven_length(config: TransformerConfig) -> None:
    plain = randomised(config)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, backend="eager")
    mask = torch.arange(6) < torch.tensor([[2], [5]])
    got = predicted(compiled, mask=mask, prepared=True)
    torch.testing.assert_close(got, predicted(plain, mask=mask), atol=1e-5, rtol=1e-5)
    assert not counters["graph_break"]


@torch.no_grad()
def test_depth_does_not_add_graphs() -> None:
    def graphs(depth: int) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        model = randomised(STDiT3Config(**FACTS | {"depth": depth}, **CAPTION))
        compile_blocks(model, backend=counter)
        predicted(model)
        return counter.frame_count

    assert graphs(1) == graphs(4) == 2  # one for space, one for time


@torch.no_grad()
def test_more_kinds_of_text_than_pytorch_would_take() -> None:
    """Other lengths of as many texts compile once more, for any lengths."""
    counter = CompileCounter()
    model = randomised(STDiT2Config(**FACTS, **CAPTION))
    compile_blocks(model, backend=counter)
    assert torch._dynamo.config.recompile_limit >= MOST_VERSIONS
    made = []
    for lengths in ([2, 5], [3, 6], [4, 5], [2, 6], [3, 4]):
        mask = torch.arange(6) < torch.tensor(lengths)[:, None]
        predicted(model, mask=mask, prepared=True)
        made.append(counter.frame_count)
    assert made[0] == 1
    assert made[2] == made[3] == made[4] <= 3


def test_model_without_such_blocks() -> None:
    with pytest.raises(KinemaError, match="no module of Linear"):
        compile_blocks(nn.Linear(2, 2))
