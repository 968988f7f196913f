"""Activation checkpointing from outside: same numbers, same names, less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kinema.config.errors import KinemaError
from kinema.config.recipe import load_recipe
from kinema.models.config import STDiT3Config
from kinema.models.stdit3 import STDiT3
from kinema.parallel.recompute import apply_recompute
from kinema.training.config import TrainRecipe
from kinema.training.parts import build_model

CONFIG = STDiT3Config(depth=2, hidden_size=24, num_heads=2, caption_channels=8, model_max_length=6)


def model_and_inputs() -> tuple[STDiT3, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    model = STDiT3(CONFIG, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    given = {
        "x": torch.randn(2, 4, 3, 4, 4, generator=generator),
        "timestep": torch.tensor([10.0, 800.0]),
        "y": torch.randn(2, 1, 6, 8, generator=generator),
        "mask": torch.arange(6) < torch.tensor([[2], [6]]),
        "fps": torch.tensor([24.0]),
        "height": torch.tensor([32.0, 32.0]),
        "width": torch.tensor([32.0, 32.0]),
    }
    return model, given


def saved_bytes(model: nn.Module, given: dict[str, Any]) -> tuple[Tensor, int]:
    """Output, and what autograd keeps of the forward pass (parameters aside)."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**given)
    return out, sum(kept.values())


def test_same_gradients_less_memory() -> None:
    plain, given = model_and_inputs()
    recomputing, _ = model_and_inputs()
    names = list(recomputing.state_dict())
    assert apply_recompute(recomputing) == [
        *("spatial_blocks.0", "spatial_blocks.1", "temporal_blocks.0", "temporal_blocks.1")
    ]
    assert list(recomputing.state_dict()) == names
    assert isinstance(recomputing.spatial_blocks[0], type(plain.spatial_blocks[0]))

    want, much = saved_bytes(plain, given)
    got, little = saved_bytes(recomputing, given)
    assert torch.equal(got, want)
    assert little < 0.35 * much

    want.square().mean().backward()
    got.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_blocks_run_twice_only_for_training() -> None:
    model, given = model_and_inputs()
    apply_recompute(model, ["spatial_blocks.1"])
    runs = []
    model.get_submodule("spatial_blocks.1.mlp").register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model(**given)
    assert len(runs) == 1
    model(**given).sum().backward()
    assert len(runs) == 3


def test_a_copy_recomputes_with_its_own_weights() -> None:
    model, given = model_and_inputs()
    apply_recompute(model)
    twin = copy.deepcopy(model)
    want = twin(**given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**given), want)
    want.sum().backward()
    assert model.t_block[1].weight.grad is None


def test_applied_twice_is_applied_once() -> None:
    model, given = model_and_inputs()
    apply_recompute(model)
    apply_recompute(model)
    runs = []
    model.get_submodule("spatial_blocks.0.mlp").register_forward_hook(lambda *_: runs.append(1))
    model(**given).sum().backward()
    assert len(runs) == 2


def test_a_pattern_that_names_nothing() -> None:
    model, _ = model_and_inputs()
    with pytest.raises(KinemaError, match=r"blocks\.\*"):
        apply_recompute(model, ["blocks.*"])


def flops(kind: str, every: int = 1) -> tuple[int, dict[str, Tensor]]:
    """Of a forward and a backward pass, counted as they run, and the gradients."""
    model, given = model_and_inputs()
    given |= {"mask": None}
    if kind != "none":
        apply_recompute(model, kind=kind, every=every)  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counted:
        model(**given).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return counted.get_total_flops(), grads


def test_selective_repeats_the_products_that_the_cost_of_a_step_names() -> None:
    latent, text, clips = (3, 4, 4), 6, 2
    plain, want = flops("none")
    selective, got = flops("selective")
    full, _ = flops("full")
    assert selective - plain == clips * CONFIG.widening_flops(latent, text)
    assert selective < full
    # Of two blocks of a kind the first.
    assert flops("selective", 2)[0] - plain == (selective - plain) / 2
    assert flops("full", 2)[0] - plain == (full - plain) / 2
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name


def test_every_second_block_of_each_kind() -> None:
    model, _ = model_and_inputs()
    assert apply_recompute(model, every=2) == ["spatial_blocks.0", "temporal_blocks.0"]


@pytest.mark.parametrize("wanted", [("recompute=selective",), ("recompute=full",)])
@pytest.mark.parametrize("every", [1, 2])
def test_an_autoencoder_recomputes(wanted: tuple[str, ...], every: int) -> None:
    def grads(*overrides: str) -> tuple[dict[str, Tensor], int]:
        model = build_model(load_recipe("tiny/vae", TrainRecipe, list(overrides)))
        video = torch.randn(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(1))
        with FlopCounterMode(display=False) as counted:
            out = model(video, noise=torch.Generator().manual_seed(2))
            out.video.square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return found, counted.get_total_flops()

    want, plain = grads()
    got, more = grads(*wanted, f"recompute_every={every}")
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name
    if "full" in wanted[0]:
        assert more > plain
    else:
        # Every convolution is kept, but for shortcuts of one pixel that widen.
        assert more == pytest.approx(plain, rel=1e-3)
