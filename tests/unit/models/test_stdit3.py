"""STDiT3: keys, initial values, masks, text of uneven length, dtypes, FLOPs, gradients."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import from_dict, to_dict
from kinema.models.build import build_transformer
from kinema.models.config import STDiT3Config
from kinema.models.stdit3 import STDiT3, initialise

TINY = STDiT3Config(
    depth=2, hidden_size=48, num_heads=4, caption_channels=20, model_max_length=10, attention="math"
)


def randomised(config: STDiT3Config = TINY, seed: int = 0) -> STDiT3:
    """A model in which no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    model = STDiT3(config, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rope.freqs":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(
    batch: int = 3, latent: tuple[int, int, int] = (4, 6, 8), seed: int = 1, **changes: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    given = {
        "x": torch.randn(batch, 4, *latent, generator=generator),
        "timestep": torch.linspace(3.0, 990.0, batch),
        "y": torch.randn(batch, 1, 10, 20, generator=generator),
        "mask": torch.arange(10) < torch.tensor([2, 10, 5])[:batch, None],
        "fps": torch.full((batch,), 24.0),
        "height": torch.full((batch,), 48.0),
        "width": torch.full((batch,), 64.0),
    }
    return given | changes


def row(given: dict[str, Any], i: int) -> dict[str, Any]:
    return {k: v[i : i + 1] for k, v in given.items()}


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, atol=tolerance * float(want.detach().abs().max()), rtol=0)


# Names and sizes


@pytest.mark.parametrize(("hidden", "heads"), [(1152, 16), (1872, 26)])
def test_released_keys(request: pytest.FixtureRequest, hidden: int, heads: int) -> None:
    folder: Path = request.config.getoption("--golden")
    table = json.loads((folder / "keys_stdit3_xl2.json").read_text())["keys"]
    with torch.device("meta"):
        model = build_transformer(STDiT3Config(hidden_size=hidden, num_heads=heads))
    state = model.state_dict()
    assert state.keys() == table.keys()
    for name, (shape, dtype, _) in table.items():
        assert str(state[name].dtype) == f"torch.{dtype}"
        expected = [hidden * (n // 1152) if n >= 1152 and n % 1152 == 0 else n for n in shape]
        assert list(state[name].shape) == expected, name


def test_meta_model_takes_weights() -> None:
    source = randomised()
    with torch.device("meta"):
        model = build_transformer(TINY)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(source.state_dict(), assign=True)
    close(model(**inputs()), source(**inputs()), 0.0)


def test_settings_survive_json_and_are_checked() -> None:
    assert from_dict(STDiT3Config, to_dict(TINY)) == TINY
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        from_dict(STDiT3Config, {"hidden_size": 100, "num_heads": 16})
    with pytest.raises(ConfigError, match="even number"):
        from_dict(STDiT3Config, {"hidden_size": 36, "num_heads": 4})


# Initial values


def test_initial_values_follow_the_table() -> None:
    model = STDiT3(TINY, torch.Generator().manual_seed(0))
    zero_weights = {"fps_embedder.mlp.2", "final_layer.linear"} | {
        f"temporal_blocks.{i}.{layer}"
        for i in range(TINY.depth)
        for layer in ("attn.proj", "cross_attn.proj", "mlp.fc2")
    }
    zero_weights = {f"{layer}.weight" for layer in zero_weights}
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        if name in zero_weights or (name.endswith("bias") and not name.startswith("x_embedder")):
            assert not value.any(), name
            continue
        assert value.any(), name
        if name.endswith("_norm.weight"):
            assert (value == 1).all()
            continue
        if name == "rope.freqs":
            exponents = torch.arange(0, 12, 2) / 12
            torch.testing.assert_close(value, 10000.0**-exponents)
            continue
        out_size, in_size = value.shape[0], value[0].numel()
        if name.startswith("x_embedder"):
            deviation = (4 * 4) ** -0.5 / 3**0.5
        elif name.endswith(("scale_shift_table", "y_embedding")):
            deviation = value.shape[1] ** -0.5
        elif name == "fps_embedder.mlp.0.weight":
            deviation = 0.02
        else:
            deviation = (2 / (in_size + out_size)) ** 0.5
        spread = 0.35 if value.numel() < 200 else 0.12
        assert float(value.square().mean().sqrt()) == pytest.approx(deviation, rel=spread), name


def test_same_generator_same_values() -> None:
    before = torch.random.get_rng_state()
    one, two, other = (STDiT3(TINY, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)  # PyTorch's own is not touched
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert not torch.equal(
        one.get_parameter("t_block.1.weight"), other.get_parameter("t_block.1.weight")
    )


def test_initialise_sets_everything() -> None:
    model, reference = (STDiT3(TINY, torch.Generator().manual_seed(7)) for _ in range(2))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name != "rope.freqs" and not name.endswith("_norm.weight"):  # set by their modules
                value.fill_(float("nan"))
    initialise(model, torch.Generator().manual_seed(7))
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


def test_temporal_blocks_and_output_start_silent() -> None:
    model = STDiT3(TINY, torch.Generator().manual_seed(0))
    assert not model(**inputs()).any()


# Masks and text


def test_noised_everywhere_is_no_frame_mask() -> None:
    model, given = randomised(), inputs()
    with_mask = model(**given, x_mask=torch.ones(3, 4, dtype=torch.bool))
    close(with_mask, model(**given), 1e-6)


def test_clean_frame_ignores_the_timestep_in_the_blocks() -> None:
    model, given = randomised(), inputs()
    seen = []
    handle = model.spatial_blocks[0].register_forward_pre_hook(lambda _, a: seen.append(a[3]))
    mask = torch.tensor([[True, True, True, True], [False] * 4, [False, True, True, False]])
    model(**given, x_mask=mask)
    model(**given | {"timestep": torch.zeros(3)}, x_mask=mask)
    handle.remove()
    at_time, at_zero = seen
    assert at_time.shape == (3, 4, 6 * 48)
    close(at_time[~mask], at_zero[~mask], 1e-6)
    assert (at_time[mask] - at_zero[mask]).abs().max() > 0.01


def test_uneven_texts_equal_each_alone() -> None:
    model, given = randomised(), inputs()
    together = model(**given)
    for i, length in enumerate((2, 10, 5)):
        alone = row(given, i)
        alone["y"], alone["mask"] = alone["y"][:, :, :length], None
        close(together[i : i + 1], model(**alone))


def test_masked_tokens_do_not_matter_wherever_they_are() -> None:
    model, given = randomised(), inputs()
    mask = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    given["mask"] = mask
    want = model(**given)
    spoiled = torch.where(mask[:, None, :, None], given["y"], torch.tensor(1e4))
    close(model(**given | {"y": spoiled}), want, 0.0)
    numbers = mask.long()  # 1 = keep
    close(model(**given | {"mask": numbers}), want, 0.0)


def test_mask_of_fewer_rows_is_tiled() -> None:
    model, given = randomised(), inputs(batch=2)
    double = {k: torch.cat([v, v]) for k, v in given.items()} | {"mask": given["mask"]}
    out = model(**double)
    close(out[:2], model(**given))
    close(out[2:], model(**given))
    fewer = double | {"fps": torch.tensor([24.0, 8.0])}
    close(model(**fewer)[2:], model(**given | {"fps": torch.tensor([24.0, 8.0])}))


def test_features_of_another_encoder() -> None:
    with pytest.raises(KinemaError, match="7 wide, the model takes 20"):
        randomised()(**inputs(y=torch.zeros(3, 1, 10, 7)))


def test_text_dropped_and_stand_in() -> None:
    model, given = randomised(), inputs()
    drop = torch.tensor([True, False, True])
    y = model.drop_text(given["y"], drop)
    assert torch.equal(y[1], given["y"][1])
    null = model.null_text(2)
    assert null.shape == (2, 1, 10, 20)
    assert torch.equal(y[drop], null)
    short = model.drop_text(given["y"][:, :, :4], drop)
    assert torch.equal(short[drop], null[:, :, :4])


@pytest.mark.parametrize("latent", [(1, 6, 8), (3, 5, 7), (5, 1, 1)])
def test_any_size_keeps_its_shape(latent: tuple[int, int, int]) -> None:
    out = randomised()(**inputs(latent=latent))
    assert out.shape == (3, 8, *latent)
    assert out.isfinite().all()


# Dtypes


@torch.no_grad()
def test_half_precision_keeps_what_must_be_exact() -> None:
    model, given = randomised(), inputs()
    want = model(**given)
    half = randomised().to(torch.bfloat16)
    assert half.rope.freqs.dtype == torch.float32
    assert torch.equal(half.rope.freqs, model.rope.freqs)
    assert not half.rope.freqs.requires_grad
    got = half(**given)
    assert got.dtype == torch.float32
    assert float((got - want).std() / want.std()) < 0.02
    # bf16 holds neither timestep; they must still be told apart.
    a, b = (half(**given | {"timestep": torch.full((3,), t)}) for t in (990.0, 991.0))
    assert not torch.equal(a, b)


@torch.no_grad()
def test_autocast_keeps_the_residual_stream() -> None:
    model, given = randomised(), inputs()
    seen = []
    model.final_layer.register_forward_pre_hook(lambda _, a: seen.append(a[0].dtype))
    want = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**given)
    assert seen == [torch.float32] * 2
    assert got.dtype == torch.float32
    assert float((got - want).std() / want.std()) < 0.02


# Work


def flops_of(model: STDiT3, given: dict[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**given)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("latent", [(1, 6, 8), (4, 6, 8), (7, 9, 3)])
@pytest.mark.parametrize("tokens", [1, 10])
def test_flops_of_one_sample(latent: tuple[int, int, int], tokens: int) -> None:
    given = inputs(batch=1, latent=latent)
    given["mask"] = torch.arange(10)[None] < tokens
    counted = flops_of(STDiT3(TINY), given)
    predicted = TINY.forward_flops(latent, tokens)
    assert predicted == pytest.approx(counted, rel=0.02)


def test_flops_at_full_size() -> None:
    config = STDiT3Config(attention="math")
    with torch.device("meta"):
        model = STDiT3(config)
        given = inputs(batch=1, latent=(15, 20, 27))
        given["y"] = torch.empty(1, 1, 300, 4096)
    given["mask"] = torch.arange(300, device="cpu")[None] < 120
    counted = flops_of(model, given)
    assert config.forward_flops((15, 20, 27), 120) == pytest.approx(counted, rel=0.005)


def test_text_padding_is_no_work() -> None:
    model, given = STDiT3(TINY), inputs()
    lengths = given["mask"].sum(dim=1).tolist()
    alone = 0
    for i, length in enumerate(lengths):
        cut = row(given, i)
        cut["y"], cut["mask"] = cut["y"][:, :, :length], None
        alone += flops_of(model, cut)
    assert flops_of(model, given) == alone
    assert flops_of(model, given | {"mask": None}) > alone


# Gradients


@pytest.mark.parametrize("latent", [(4, 6, 8), (1, 6, 8)])
def test_everything_that_trains_gets_a_gradient(latent: tuple[int, int, int]) -> None:
    model = randomised()
    x_mask = torch.ones(3, latent[0], dtype=torch.bool)
    x_mask[0, 0] = False
    model(**inputs(latent=latent), x_mask=x_mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name == "rope.freqs":
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        # An image has one frame: there is nothing that queries and keys in time could decide.
        one_key = latent[0] == 1 and name.startswith("temporal") and "_norm" in name
        assert bool(parameter.grad.any()) is not one_key, name


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_half_precision(autocast: bool) -> None:
    exact, model, given = randomised(), randomised(), inputs()
    model = model if autocast else model.to(torch.bfloat16)
    exact(**given).square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**given)
    out.square().mean().backward()
    pairs = zip(exact.named_parameters(), model.parameters(), strict=True)
    wanted, got = zip(*((p.grad, q.grad) for (_, p), q in pairs if p.requires_grad), strict=True)
    want, have = (torch.cat([g.float().flatten() for g in grads]) for grads in (wanted, got))
    assert float((have - want).norm() / want.norm()) < 0.05


def test_frozen_caption_projection() -> None:
    model = randomised(dataclasses.replace(TINY, freeze_y_embedder=True))
    model(**inputs()).square().mean().backward()
    assert all(p.grad is None for p in model.y_embedder.parameters())
    assert model.t_block[1].weight.grad is not None
