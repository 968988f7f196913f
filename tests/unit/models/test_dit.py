"""DiT and Latte: conditions, positions, initial values, dtypes, FLOPs, gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import from_dict, to_dict
from kinema.models.build import build_transformer
from kinema.models.config import (
    ClassTextConfig,
    CLIPTextConfig,
    DiTConfig,
    HashTextConfig,
    LatteConfig,
    mismatch,
)
from kinema.models.dit import DiT, Latte, initialise
from kinema.models.transformer import ClipShape

SMALL = {"depth": 4, "hidden_size": 48, "num_heads": 4, "attention": "math"}
DIT = from_dict(DiTConfig, SMALL | {"condition": "label_7"})
LATTE = from_dict(LatteConfig, SMALL | {"condition": "label_7"})
DIT_TEXT = from_dict(DiTConfig, SMALL | {"condition": "text", "caption_channels": 20})
LATTE_TEXT = from_dict(LatteConfig, SMALL | {"condition": "text", "caption_channels": 20})
ALL = pytest.mark.parametrize(
    "config", [DIT, LATTE, DIT_TEXT, LATTE_TEXT], ids=["dit", "latte", "dit-text", "latte-text"]
)

Config = DiTConfig | LatteConfig
LATENT = (3, 6, 8)


def randomised(config: Config, seed: int = 0) -> DiT | Latte:
    """A model in which no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    model = build_transformer(config, generator)
    assert isinstance(model, (DiT, Latte))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(
    config: Config, batch: int = 3, latent: tuple[int, int, int] = LATENT, seed: int = 1
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(7, (batch,), generator=generator)
    if config.num_classes is None:
        y = torch.randn(batch, 1, 20, generator=generator)
    return {
        "x": torch.randn(batch, 4, *latent, generator=generator),
        "timestep": torch.linspace(3.0, 990.0, batch),
        "y": y,
    }


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, atol=tolerance * float(want.detach().abs().max()), rtol=0)


@ALL
def test_rows_do_not_see_each_other(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    together = model(**given)
    assert together.shape == (3, 8, *LATENT)
    for i in range(3):
        close(together[i : i + 1], model(**{k: v[i : i + 1] for k, v in given.items()}))


@ALL
@pytest.mark.parametrize("latent", [(1, 6, 8), (3, 5, 7), (5, 1, 1)])
def test_any_size_keeps_its_shape(config: Config, latent: tuple[int, int, int]) -> None:
    out = randomised(config)(**inputs(config, latent=latent))
    assert out.shape == (3, 8, *latent)
    assert out.isfinite().all()


@ALL
def test_condition_and_timestep_matter(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    want = model(**given)
    for name, other in (("y", inputs(config, seed=5)["y"]), ("timestep", given["timestep"] + 1)):
        assert (model(**given | {name: other}) - want).abs().max() > 1e-4, name


@ALL
def test_prepared_condition_gives_the_same(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    shape = ClipShape(*torch.ones(4, 3))
    want = model(**given)
    for text in (given["y"], model.prepare_text(given["y"])):
        got = model.predict(
            given["x"], given["timestep"], text, mask=None, x_mask=None, shape=shape
        )
        close(got, want, 0.0)


def test_latte_looks_along_time_in_odd_blocks_only() -> None:
    model, given = randomised(LATTE), inputs(LATTE)
    changed = given["x"].clone()
    changed[:, :, 0, :2, :2] += 1  # one token of the first frame
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda _, __, out: seen.append(out))
    model.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out.transpose(1, 2)))
    for x in (given["x"], changed):
        model(**given | {"x": x})
    first, second = (after - before for before, after in zip(seen[:2], seen[2:], strict=True))
    assert first[:, 0].abs().amin(dim=(0, 2)).max() > 0  # all tokens of that frame
    assert first[:, 0].abs().amax(dim=(0, 2)).min() > 0
    assert not first[:, 1:].any()
    assert second[:, 1:].abs().amax(dim=(0, 2, 3)).min() > 0  # then all frames


@pytest.mark.parametrize("video", [False, True])
def test_positions_in_time(video: bool) -> None:
    config = dataclasses.replace(DIT, no_temporal_pos_emb=not video)
    model, given = randomised(config), inputs(config)
    turned = model(**given | {"x": given["x"].flip(2)}).flip(2)
    same = bool((turned - model(**given)).abs().max() < 1e-4)
    assert same is not video


# Classes and captions


@pytest.mark.parametrize("config", [DIT, LATTE])
def test_no_class_is_the_number_behind_the_last(config: Config) -> None:
    model = randomised(config)
    null = model.null_text(2)
    assert null.dtype == torch.int64
    assert null.tolist() == [7, 7]
    y = torch.tensor([3, 0, 6])
    dropped = model.drop_text(y, torch.tensor([True, False, True]))
    assert dropped.tolist() == [7, 0, 7]
    table = model.get_parameter("y_embedder.embedding_table.weight")
    assert torch.equal(model.prepare_text(null).vectors, table[[7, 7]])


@pytest.mark.parametrize("number", [8, -1, 1000])
def test_class_out_of_range(number: int) -> None:
    given = inputs(DIT) | {"y": torch.tensor([1, number, 2])}
    with pytest.raises(KinemaError, match=f"class {number} does not exist.* 7 classes, 0 to 6"):
        randomised(DIT)(**given)


def test_model_that_never_dropped_a_class() -> None:
    config = dataclasses.replace(DIT, class_dropout_prob=0.0)
    model = randomised(config)
    assert model.get_parameter("y_embedder.embedding_table.weight").shape == (7, 48)
    with pytest.raises(KinemaError, match="no guidance"):
        model.null_text(1)
    with pytest.raises(KinemaError, match="class 7 does not exist"):
        model(**inputs(config) | {"y": torch.tensor([7, 1, 1])})


@pytest.mark.parametrize("config", [DIT_TEXT, LATTE_TEXT])
def test_no_caption(config: Config) -> None:
    model, y = randomised(config), inputs(config)["y"]
    null = model.null_text(2)
    assert null.shape == (2, 1, 20)
    drop = torch.tensor([True, False, True])
    dropped = model.drop_text(y, drop)
    assert torch.equal(dropped[drop], null)
    assert torch.equal(dropped[1], y[1])
    # The original gives its pooled vectors one axis more.
    assert torch.equal(model.prepare_text(y).vectors, model.prepare_text(y[:, None]).vectors)


def test_features_of_another_kind() -> None:
    with pytest.raises(KinemaError, match=r"one class number for each sample, not \(3, 1, 20\)"):
        randomised(DIT)(**inputs(DIT) | {"y": torch.zeros(3, 1, 20)})
    for y in (torch.zeros(3, 1, 21), torch.zeros(3, 1, 4, 20)):
        with pytest.raises(KinemaError, match="one vector of 20"):
            randomised(DIT_TEXT)(**inputs(DIT_TEXT) | {"y": y})


def test_which_text_encoder_fits() -> None:
    assert mismatch(DIT, ClassTextConfig(num_classes=7)) is None
    assert "one of 7 classes" in str(mismatch(DIT, ClassTextConfig(num_classes=8)))
    assert "classes" in str(mismatch(LATTE, HashTextConfig()))
    assert mismatch(DIT_TEXT, CLIPTextConfig(dim=20)) is None
    assert "caption_channels is 20" in str(mismatch(DIT_TEXT, CLIPTextConfig(dim=512)))


# Settings and initial values


@ALL
def test_settings_survive_json_and_are_checked(config: Config) -> None:
    assert from_dict(type(config), to_dict(config)) == config
    with pytest.raises(ConfigError, match="`text` or `label_N`"):
        from_dict(type(config), {"condition": "label_0"})


@ALL
def test_initialise_sets_everything(config: Config) -> None:
    state = torch.random.get_rng_state()
    models = [build_transformer(config, torch.Generator().manual_seed(s)) for s in (7, 7, 8)]
    assert torch.equal(torch.random.get_rng_state(), state)  # PyTorch's own is not touched
    model, reference, other = models
    assert isinstance(model, (DiT, Latte))
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(float("nan"))
    initialise(model, torch.Generator().manual_seed(7))
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
        silent = "adaLN" in name or name.endswith("bias") or name.startswith("final_layer")
        assert bool(value.any()) is not silent, name
        if not silent:
            assert not torch.equal(value, other.state_dict()[name]), name
            small = "_embedder" in name and not name.startswith("x_embedder")
            if small and not name.endswith("y_embedding"):
                assert float(value.std()) == pytest.approx(0.02, rel=0.15), name
    assert not model(**inputs(config)).any()


@ALL
def test_meta_model_takes_weights(config: Config) -> None:
    source = randomised(config)
    with torch.device("meta"):
        model = build_transformer(config)
    assert all(t.is_meta for t in model.state_dict().values())
    model.load_state_dict(source.state_dict(), assign=True)
    close(model(**inputs(config)), source(**inputs(config)), 0.0)


@ALL
def test_shapes_on_the_meta_device(config: Config) -> None:
    with torch.device("meta"):
        model = build_transformer(config)
    out = model(**{k: v.to("meta") for k, v in inputs(config).items()})
    assert out.is_meta
    assert out.shape == (3, 8, *LATENT)


# Dtypes, work, gradients


@ALL
@torch.no_grad()
def test_half_precision(config: Config) -> None:
    given = inputs(config)
    want = randomised(config)(**given)
    half = randomised(config).to(torch.bfloat16)
    got = half(**given)
    assert got.dtype == torch.float32
    assert float((got - want).std() / want.std()) < 0.03
    # bf16 holds neither timestep; they must still be told apart.
    a, b = (half(**given | {"timestep": torch.full((3,), t)}) for t in (990.0, 991.0))
    assert not torch.equal(a, b)


@ALL
@torch.no_grad()
def test_autocast_keeps_the_residual_stream(config: Config) -> None:
    model, given = randomised(config), inputs(config)
    seen = []
    model.final_layer.register_forward_pre_hook(lambda _, a: seen.append(a[0].dtype))
    want = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**given)
    assert seen == [torch.float32] * 2
    assert float((got - want).std() / want.std()) < 0.03


@ALL
@pytest.mark.parametrize("latent", [(1, 6, 8), (4, 6, 8), (7, 9, 3)])
def test_flops_of_one_sample(config: Config, latent: tuple[int, int, int]) -> None:
    model, given = build_transformer(config), inputs(config, batch=1, latent=latent)
    with FlopCounterMode(display=False) as counter:
        model(**given)
    assert config.forward_flops(latent, 0) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("config", [DiTConfig(attention="math"), LatteConfig(attention="math")])
def test_flops_at_full_size(config: Config) -> None:
    latent = config.input_size
    with torch.device("meta"):
        model = build_transformer(config)
        x, timestep = torch.empty(1, 4, *latent), torch.empty(1)
        y = torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(x, timestep, y)
    assert config.forward_flops(latent, 0) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@ALL
def test_everything_gets_a_gradient(config: Config) -> None:
    model = randomised(config)
    model(**inputs(config)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
