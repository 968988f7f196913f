"""STDiT and STDiT2: initial values, sizes, masks, dtypes, FLOPs, gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import from_dict, to_dict
from kinema.models.build import build_transformer
from kinema.models.config import STDiT2Config, STDiTConfig
from kinema.models.stdit import STDiT, initialise
from kinema.models.stdit2 import STDiT2
from kinema.models.transformer import ClipShape

Config = STDiTConfig | STDiT2Config
Model = STDiT | STDiT2
FACTS: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 48,
    "num_heads": 4,
    "caption_channels": 20,
    "model_max_length": 10,
    "attention": "math",
}
ONE = STDiTConfig(**FACTS, input_size=(4, 6, 8), time_scale=2 / 3)
TWO = STDiT2Config(**FACTS)
BOTH = pytest.mark.parametrize("config", [ONE, TWO], ids=["stdit", "stdit2"])


def built(config: Config, seed: int = 0) -> Model:
    model = build_transformer(config, torch.Generator().manual_seed(seed))
    assert isinstance(model, (STDiT, STDiT2))
    return model


def randomised(config: Config, seed: int = 0) -> Model:
    """A model in which no branch is silent."""
    model, generator = built(config, seed), torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rope.freqs":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(
    config: Config, batch: int = 3, latent: tuple[int, int, int] = (4, 6, 8), **changes: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    given = {
        "x": torch.randn(batch, 4, *latent, generator=generator),
        "timestep": torch.linspace(3.0, 990.0, batch),
        "y": torch.randn(batch, 1, 10, 20, generator=generator),
        "mask": torch.arange(10) < torch.tensor([2, 10, 5])[:batch, None],
    }
    if isinstance(config, STDiT2Config):
        numbers = {"num_frames": 16.0, "height": 48.0, "width": 64.0, "ar": 0.75, "fps": 24.0}
        given |= {name: torch.full((batch,), value) for name, value in numbers.items()}
    return given | changes


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, atol=tolerance * float(want.detach().abs().max()), rtol=0)


# Settings and names


@BOTH
def test_settings_survive_json(config: Config) -> None:
    assert from_dict(type(config), to_dict(config)) == config


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="multiple of 3"):
        from_dict(STDiT2Config, {"hidden_size": 64, "num_heads": 4})
    with pytest.raises(ConfigError, match="even number"):
        from_dict(STDiT2Config, {"hidden_size": 36, "num_heads": 4})


@BOTH
def test_meta_model_takes_weights(config: Config) -> None:
    source = randomised(config)
    with torch.device("meta"):
        model = build_transformer(config)
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(source.state_dict(), assign=True)
    close(model(**inputs(config)), source(**inputs(config)), 0.0)


def test_tables_that_files_carry() -> None:
    with torch.device("meta"):
        model = build_transformer(ONE)
    tables = model.recomputed_tensors()
    assert {name: tuple(t.shape) for name, t in tables.items()} == {
        "pos_embed": (1, 12, 48),
        "pos_embed_temporal": (1, 4, 48),
    }
    assert tables.keys().isdisjoint(model.state_dict())
    # Second token of the first row: column 1 in steps of 1 / space_scale, row 0.
    place = 1 / ONE.space_scale
    frequencies = 10000.0 ** -(torch.arange(12).double() / 12)
    angles = place * frequencies
    want = torch.cat([angles.sin(), angles.cos(), torch.zeros(12), torch.ones(12)])
    close(tables["pos_embed"][0, 1], want.float(), 1e-6)
    frequencies = 10000.0 ** -(torch.arange(24).double() / 24)
    angles = 3 / ONE.time_scale * frequencies
    close(tables["pos_embed_temporal"][0, 3], torch.cat([angles.sin(), angles.cos()]).float(), 1e-6)


# Initial values


@BOTH
def test_initial_values_follow_the_table(config: Config) -> None:
    narrow = {
        *("t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1", "t_block_temp.1"),
        *("y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2"),
    }
    zero = ("attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
    for name, value in built(config).state_dict().items():
        assert value.isfinite().all(), name
        if name.endswith(zero) or (name.endswith("bias") and not name.startswith("x_embedder")):
            assert not value.any(), name
            continue
        assert value.any(), name
        if name.endswith("_norm.weight"):
            assert (value == 1).all()
            continue
        if name == "rope.freqs":
            torch.testing.assert_close(value, 10000.0 ** -(torch.arange(0, 12, 2) / 12))
            continue
        out_size, in_size = value.shape[0], value[0].numel()
        if name == "x_embedder.proj.bias":
            deviation = (4 * 4) ** -0.5 / 3**0.5
        elif "scale_shift_table" in name or name.endswith("y_embedding"):
            deviation = value.shape[1] ** -0.5
        elif name.removesuffix(".weight") in narrow:
            deviation = 0.02
        else:
            deviation = (2 / (in_size + out_size)) ** 0.5
        spread = 0.35 if value.numel() < 200 else 0.12
        assert float(value.square().mean().sqrt()) == pytest.approx(deviation, rel=spread), name


@BOTH
def test_initialise_sets_everything(config: Config) -> None:
    model, reference = built(config, 7), built(config, 7)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name != "rope.freqs" and not name.endswith("_norm.weight"):  # set by their modules
                value.fill_(float("nan"))
    before = torch.random.get_rng_state()
    initialise(model, torch.Generator().manual_seed(7))
    assert torch.equal(torch.random.get_rng_state(), before)  # PyTorch's own is not touched
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name


@BOTH
def test_blocks_start_as_those_of_an_image_model(config: Config) -> None:
    """Frames do not see each other before training."""
    model = built(config)
    with torch.no_grad():
        model.final_layer.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
    given = inputs(config)
    changed = given["x"].clone()
    changed[:, :, 2] += 1
    moved = (model(**given | {"x": changed}) - model(**given)).abs().amax(dim=(0, 1, 3, 4))
    assert (moved > 0).tolist() == [False, False, True, False]


# What the model is told


@BOTH
@pytest.mark.parametrize("latent", [(1, 6, 8), (3, 5, 7), (6, 1, 1)])
def test_any_size_keeps_its_shape(config: Config, latent: tuple[int, int, int]) -> None:
    given = inputs(config, latent=latent)
    x_mask = torch.ones(3, latent[0], dtype=torch.bool)
    x_mask[1, 0] = False
    out = randomised(config)(**given, x_mask=x_mask)
    assert out.shape == (3, 8, *latent)
    assert out.isfinite().all()


@BOTH
def test_noised_everywhere_is_no_frame_mask(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    with_mask = model(**given, x_mask=torch.ones(3, 4, dtype=torch.bool))
    close(with_mask, model(**given), 1e-6)


@BOTH
def test_clean_frames_are_modulated_as_at_zero(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    mask = torch.tensor([[True] * 4, [False] * 4, [False, True, True, False]])
    seen: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, a: seen.extend(a[3:5]))
    model(**given, x_mask=mask)
    model(**given | {"timestep": torch.zeros(3)}, x_mask=mask)
    handle.remove()
    for at_time, at_zero in zip(seen[:2], seen[2:], strict=True):
        if at_time.shape[1] == 1:  # 1.0: the gate in time is that of noised frames, everywhere
            assert isinstance(config, STDiTConfig)
            continue
        close(at_time[~mask], at_zero[~mask], 1e-6)
        assert (at_time[mask] - at_zero[mask]).abs().max() > 0.01


@BOTH
def test_uneven_texts_equal_each_alone(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    together = model(**given)
    for i, length in enumerate((2, 10, 5)):
        alone = {name: value[i : i + 1] for name, value in given.items()}
        alone["y"], alone["mask"] = alone["y"][:, :, :length], None
        close(together[i : i + 1], model(**alone))


@BOTH
def test_features_of_another_encoder(config: Config) -> None:
    with pytest.raises(KinemaError, match="7 wide, the model takes 20"):
        randomised(config)(**inputs(config, y=torch.zeros(3, 1, 10, 7)))


@BOTH
def test_text_dropped_and_stand_in(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    drop = torch.tensor([True, False, True])
    y = model.drop_text(given["y"], drop)
    assert torch.equal(y[1], given["y"][1])
    assert torch.equal(y[drop], model.null_text(2))


@BOTH
def test_predict_is_forward(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    numbers = (torch.full((3,), v) for v in (24.0, 48.0, 64.0, 16.0))
    x_mask = torch.tensor([[True, False, True, True]]).repeat(3, 1)
    got = model.predict(
        given["x"],
        given["timestep"],
        given["y"],
        mask=given["mask"],
        x_mask=x_mask,
        shape=ClipShape(*numbers),
    )
    close(got, model(**given, x_mask=x_mask), 0.0)


@pytest.mark.parametrize("name", ["num_frames", "height", "width", "ar", "fps"])
def test_stdit2_hears_every_number(name: str) -> None:
    model, given = randomised(TWO), inputs(TWO)
    other = given[name].clone()
    other[2] *= 2  # of the last sample, so that positions stay
    moved = (model(**given | {name: other}) - model(**given)).abs().amax(dim=(1, 2, 3, 4))
    assert (moved > 1e-4).tolist() == [False, False, True]


def test_stdit2_tiles_numbers_of_fewer_rows() -> None:
    model, given = randomised(TWO), inputs(TWO, batch=2)
    given["fps"] = torch.tensor([8.0, 24.0])
    double = {name: torch.cat([value, value]) for name, value in given.items()}
    want = model(**double)
    names = ("num_frames", "height", "width", "ar", "fps", "mask")
    close(model(**double | {name: given[name] for name in names}), want)


def test_order_of_norm_and_rotation() -> None:
    legacy, later = (
        randomised(dataclasses.replace(TWO, qk_norm_legacy=value)) for value in (True, False)
    )
    later.load_state_dict(legacy.state_dict())
    image = inputs(TWO, latent=(1, 6, 8))
    close(later(**image), legacy(**image), 0.0)  # there is nothing to rotate
    video = inputs(TWO)
    assert (later(**video) - legacy(**video)).abs().max() > 1e-3


# Dtypes


@BOTH
@torch.no_grad()
def test_half_precision_keeps_what_must_be_exact(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    want = model(**given)
    half = randomised(config).to(torch.bfloat16)
    if isinstance(half, STDiT2):
        assert half.rope.freqs.dtype == torch.float32
    got = half(**given)
    assert got.dtype == torch.float32
    assert float((got - want).std() / want.std()) < 0.02
    # bf16 holds neither timestep; they must still be told apart.
    a, b = (half(**given | {"timestep": torch.full((3,), t)}) for t in (990.0, 991.0))
    assert not torch.equal(a, b)


@BOTH
@torch.no_grad()
def test_autocast_keeps_the_residual_stream(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    seen = []
    model.final_layer.register_forward_pre_hook(lambda _, a: seen.append(a[0].dtype))
    want = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**given)
    assert seen == [torch.float32] * 2
    assert got.dtype == torch.float32
    assert float((got - want).std() / want.std()) < 0.02


# Work and gradients


@BOTH
@pytest.mark.parametrize("latent", [(1, 6, 8), (4, 6, 8), (7, 9, 3)])
@pytest.mark.parametrize("tokens", [1, 10])
def test_flops_of_one_sample(config: Config, latent: tuple[int, int, int], tokens: int) -> None:
    given = inputs(config, batch=1, latent=latent)
    given["mask"] = torch.arange(10)[None] < tokens
    model = built(config)
    with FlopCounterMode(display=False) as counter:
        model(**given)
    counted = counter.get_total_flops()
    assert config.forward_flops(latent, tokens) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("kind", [STDiTConfig, STDiT2Config])
def test_flops_at_full_size(kind: type[Config]) -> None:
    config = kind(attention="math")
    with torch.device("meta"):
        model = build_transformer(config)
        given = inputs(config, batch=1, latent=(16, 32, 32))
        given["y"] = torch.empty(1, 1, config.model_max_length, 4096)
    given["mask"] = torch.arange(config.model_max_length, device="cpu")[None] < 70
    with FlopCounterMode(display=False) as counter:
        model(**given)
    counted = counter.get_total_flops()
    assert config.forward_flops((16, 32, 32), 70) == pytest.approx(counted, rel=0.005)


@BOTH
@pytest.mark.parametrize("latent", [(4, 6, 8), (1, 6, 8)])
def test_everything_that_trains_gets_a_gradient(
    config: Config, latent: tuple[int, int, int]
) -> None:
    model = randomised(config)
    x_mask = torch.ones(3, latent[0], dtype=torch.bool)
    x_mask[0, 0] = False
    model(**inputs(config, latent=latent), x_mask=x_mask).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name == "rope.freqs":
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        # An image has one frame: there is nothing that queries and keys in time could decide.
        one_key = latent[0] == 1 and "attn_temp" in name and "_norm" in name
        assert bool(parameter.grad.any()) is not one_key, name


def test_frozen_caption_projection() -> None:
    model = randomised(dataclasses.replace(TWO, freeze_y_embedder=True))
    model(**inputs(TWO)).square().mean().backward()
    assert all(p.grad is None for p in model.y_embedder.parameters())
    assert model.blocks[0].get_parameter("attn.qkv.weight").grad is not None
