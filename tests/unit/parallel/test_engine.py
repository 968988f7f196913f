"""A model sharded by FSDP2 in a world of one: precision, hooks, names, mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor

from kinema.config.errors import KinemaError
from kinema.models.build import build_transformer
from kinema.models.config import (
    DiTConfig,
    KVCompressConfig,
    LatteConfig,
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    TransformerConfig,
)
from kinema.models.transformer import ClipShape, Transformer
from kinema.parallel.compile import compile_blocks
from kinema.parallel.config import ParallelConfig
from kinema.parallel.engine import Engine
from kinema.parallel.recompute import apply_recompute
from kinema.parallel.shard import shard_mesh
from kinema.parallel.world import World, open_world
from kinema.training.stand_in import stand_in_loss

SIZE: dict[str, Any] = {"depth": 1, "hidden_size": 24, "num_heads": 2}
CAPTION: dict[str, Any] = {"caption_channels": 12, "model_max_length": 6}
CONFIGS: dict[str, TransformerConfig] = {
    "stdit": STDiTConfig(**SIZE, **CAPTION),
    "stdit2": STDiT2Config(**SIZE, **CAPTION),
    "stdit3": STDiT3Config(**SIZE, **CAPTION),
    "pixart": PixArtConfig(**SIZE, **CAPTION, size_conditions=True, qk_norm=True),
    "pixart-sigma": PixArtConfig(
        **SIZE, **CAPTION, kv_compress=KVCompressConfig(sampling="conv", kv_compress_layer=(0,))
    ),
    "dit": DiTConfig(**SIZE, condition="label_5"),
    "dit-text": DiTConfig(**SIZE, condition="text", caption_channels=12),
    "latte": LatteConfig(**SIZE, condition="label_5"),
}
ZERO3 = ParallelConfig(shard="zero3")
HOOKS = {"forward": "register_forward_pre_hook", "backward": "register_full_backward_pre_hook"}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world("cpu", group=True) as world:
        yield world


def model_of(config: TransformerConfig) -> Transformer:
    generator = torch.Generator().manual_seed(0)
    model = build_transformer(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def predicted(model: Transformer, *, frames: int = 3) -> Tensor:
    config, generator = model.config, torch.Generator().manual_seed(1)
    text: Any = torch.tensor([1, 4])
    if isinstance(config, (DiTConfig, LatteConfig)):
        if config.condition == "text":
            text = torch.randn(2, 1, 12, generator=generator)
    else:
        text = torch.randn(2, 1, 6, 12, generator=generator)
    with torch.no_grad():
        text = model.drop_text(text, torch.tensor([True, False]))
    return model.predict(
        torch.randn(2, 4, frames, 4, 8, generator=generator),
        torch.tensor([10.0, 800.0]),
        text,
        mask=None,
        x_mask=None,
        shape=ClipShape(*(torch.full((2,), v) for v in (24.0, 32.0, 64.0, 9.0))),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sharded_model_computes_as_one_cast_to_bf16(name: str, world: World) -> None:
    half = model_of(CONFIGS[name]).to(torch.bfloat16)
    model = model_of(CONFIGS[name])
    names = list(model.state_dict())
    engine = Engine(model, world, ZERO3, dtype=torch.bfloat16)
    assert list(model.state_dict()) == names
    with engine.forward():  # autocast, which the model must not notice
        got = predicted(model)
    want = predicted(half)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    want.square().mean().backward()
    got.square().mean().backward()
    cast = dict(half.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter.grad, DTensor)
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            expected = cast[key].grad
            assert expected is not None
            assert torch.equal(parameter.grad.to_local(), expected.float()), key
        else:
            assert key == "rope.freqs"
            assert not isinstance(parameter, DTensor)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_stand_in_reaches_every_parameter_and_moves_none(
    name: str, precision: torch.dtype, world: World
) -> None:
    model = model_of(CONFIGS[name])
    engine = Engine(model, world, ZERO3, dtype=precision)
    with engine.forward():
        loss = stand_in_loss(model, world.device)
    loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter.grad, DTensor), key
            assert parameter.grad.to_local().eq(0).all(), key


@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_a_forward_pass_without_gradients_gives_back_what_was_gathered(
    shard: Any, world: World
) -> None:
    model = model_of(CONFIGS["stdit3"])
    engine = Engine(model, world, ParallelConfig(shard=shard))
    with torch.no_grad(), engine.forward():
        predicted(model)
    assert all(isinstance(p, DTensor) for n, p in model.named_parameters() if n != "rope.freqs")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_a_pass_that_ran_out_of_memory_leaves_nothing_behind(
    where: str, shard: Any, world: World
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    model = model_of(CONFIGS["stdit3"])
    engine = Engine(model, world, ParallelConfig(shard=shard))
    gradients = engine.gradients({n: p for n, p in model.named_parameters() if p.requires_grad})

    def grads(failing: bool = False) -> list[Tensor]:
        gradients.zero()
        gradients.expect(last=True)
        block = model.get_submodule("temporal_blocks.0.mlp")
        hook = getattr(block, HOOKS[where])(fail if failing else lambda *_: None)
        try:
            with engine.forward():
                predicted(model).square().mean().backward()
        finally:
            hook.remove()
        gradients.finish()
        return [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]

    before = grads()
    with pytest.raises(torch.OutOfMemoryError):
        grads(failing=True)
    if not engine.recover():
        pytest.skip("this PyTorch cannot; model and engine are made anew")
    assert all(isinstance(p, DTensor) for n, p in model.named_parameters() if n != "rope.freqs")
    for got, want in zip(grads(), before, strict=True):
        assert torch.equal(got, want)


def test_what_decides_sizes_is_not_moved_with_the_other_inputs(world: World) -> None:
    model = model_of(CONFIGS["stdit3"])
    engine = Engine(model, world, ZERO3)
    seen: dict[str, Any] = {}
    inside: list[Any] = []

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)  # what FSDP2's own hook finds and sends to the GPU

    model.register_forward_pre_hook(look, with_kwargs=True)
    pack_text: Any = model.pack_text
    model.pack_text = lambda y, mask: inside.append(mask) or pack_text(y, mask)  # type: ignore
    mask = torch.arange(6).expand(2, 6) < 4
    with torch.no_grad(), engine.forward():
        model(
            torch.zeros(2, 4, 3, 4, 8),
            torch.ones(2),
            torch.zeros(2, 1, 6, 12),
            mask=mask,
            fps=torch.ones(2),
            height=torch.ones(2),
            width=torch.ones(2),
        )
    assert not isinstance(seen["mask"], Tensor)
    assert isinstance(seen["fps"], Tensor)
    assert inside == [mask]


def test_depth_adds_no_compiled_code_to_sharded_blocks(world: World) -> None:
    def graphs(depth: int) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        model = model_of(STDiT3Config(**SIZE | {"depth": depth}, **CAPTION))
        apply_recompute(model)
        compile_blocks(model, backend=counter)
        engine = Engine(model, world, ZERO3)
        with engine.forward():
            predicted(model).sum().backward()
        return counter.frame_count

    assert graphs(1) == graphs(3)
    torch._dynamo.reset()


def test_whole_copies_move_to_the_device_and_are_plain(world: World) -> None:
    model = model_of(CONFIGS["stdit3"])
    engine = Engine(model, world, ParallelConfig(), dtype=torch.bfloat16)
    assert not engine.sharded
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    with engine.forward():
        assert torch.is_autocast_enabled("cpu")


def test_a_copy_is_shared_by_a_divisor_of_the_ranks() -> None:
    six = World(0, 6, torch.device("cpu"), local_size=2)
    with pytest.raises(KinemaError, match="6 processes do not divide into groups of 4") as caught:
        shard_mesh(six, ParallelConfig(shard="zero3", shard_over=4))
    assert caught.value.hint == "one of 2, 3, 6; or all"


def test_a_recipe_for_many_ranks_runs_on_one(world: World) -> None:
    assert shard_mesh(world, ParallelConfig(shard="zero3", shard_over=8)).shape == (1,)


def test_machines_with_different_numbers_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "gather", lambda self, value: [2, 2, 1])
    uneven = World(0, 3, torch.device("cpu"), local_size=2)
    with pytest.raises(KinemaError, match="machines run 1 and 2 processes"):
        shard_mesh(uneven, ParallelConfig(shard="zero2", shard_over="node"))
    monkeypatch.setattr(World, "gather", lambda self, value: [value] * 3)
    with pytest.raises(KinemaError, match="machines run one process each"):
        shard_mesh(
            World(0, 3, torch.device("cpu")), ParallelConfig(shard="zero2", shard_over="node")
        )


def test_fewer_than_two_ranks_share_nothing() -> None:
    with pytest.raises(ValueError, match="at least 2 ranks"):
        ParallelConfig(shard="zero3", shard_over=1)
