"""PixArt: sizes, positions, short videos, fewer keys, text, initial values, dtypes, FLOPs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kinema.config.errors import ConfigError, KinemaError
from kinema.config.settings import from_dict, to_dict
from kinema.models.build import build_transformer
from kinema.models.config import LatentSize, PixArtConfig
from kinema.models.pixart import CompressedSelfAttention, PixArt, initialise
from kinema.models.transformer import ClipShape

SMALL = {
    "depth": 2,
    "hidden_size": 48,
    "num_heads": 4,
    "caption_channels": 20,
    "model_max_length": 10,
    "input_size": (1, 8, 8),
    "attention": "math",
}
ALPHA = from_dict(PixArtConfig, SMALL)
MS = dataclasses.replace(ALPHA, size_conditions=True, space_scale=2.0)
VIDEO = dataclasses.replace(ALPHA, no_temporal_pos_emb=False)


def sigma(sampling: str = "conv", factor: int = 2) -> PixArtConfig:
    compress = {"sampling": sampling, "scale_factor": factor, "kv_compress_layer": [1]}
    return from_dict(PixArtConfig, SMALL | {"qk_norm": True, "kv_compress": compress})


SIGMA = sigma()
ALL = pytest.mark.parametrize(
    "config", [ALPHA, MS, VIDEO, SIGMA], ids=["alpha", "ms", "video", "sigma"]
)
LATENT = (2, 6, 8)


def randomised(config: PixArtConfig, seed: int = 0) -> PixArt:
    """A model in which no branch is silent."""
    generator = torch.Generator().manual_seed(seed)
    model = build_transformer(config, generator)
    assert isinstance(model, PixArt)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(
    config: PixArtConfig, batch: int = 3, latent: LatentSize = LATENT, seed: int = 1
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([[48.0, 64.0], [64.0, 64.0], [512.0, 1920.0]])[:batch]
    given = {
        "x": torch.randn(batch, 4, *latent, generator=generator),
        "timestep": torch.linspace(3.0, 990.0, batch),
        "y": torch.randn(batch, 1, 10, 20, generator=generator),
        "mask": torch.arange(10) < torch.tensor([2, 10, 5])[:batch, None],
    }
    if config.size_conditions:
        given |= {"hw": sizes, "ar": sizes[:, :1] / sizes[:, 1:]}
    return given


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, atol=tolerance * float(want.detach().abs().max()), rtol=0)


@ALL
def test_rows_do_not_see_each_other(config: PixArtConfig) -> None:
    model, given = randomised(config), inputs(config)
    together = model(**given)
    assert together.shape == (3, 8, *LATENT)
    for i, length in enumerate((2, 10, 5)):
        alone = {k: v[i : i + 1] for k, v in given.items()}
        alone["y"], alone["mask"] = alone["y"][:, :, :length], None
        close(together[i : i + 1], model(**alone))


@ALL
@pytest.mark.parametrize("latent", [(1, 6, 8), (3, 5, 7), (5, 4, 4)])
def test_any_size_keeps_its_shape(config: PixArtConfig, latent: LatentSize) -> None:
    out = randomised(config)(**inputs(config, latent=latent))
    assert out.shape == (3, 8, *latent)
    assert out.isfinite().all()


@ALL
def test_prepared_text_gives_the_same(config: PixArtConfig) -> None:
    model, given = randomised(config), inputs(config)
    height, width = torch.tensor([48.0, 64.0, 512.0]), torch.tensor([64.0, 64.0, 1920.0])
    shape = ClipShape(torch.ones(3), height, width, torch.ones(3))
    want = model(**given)
    prepared = model.prepare_text(given["y"], given["mask"])
    assert isinstance(prepared.per_block[1], tuple)
    for text, mask in ((given["y"], given["mask"]), (prepared, None)):
        got = model.predict(
            given["x"], given["timestep"], text, mask=mask, x_mask=None, shape=shape
        )
        close(got, want, 0.0)


# Sizes and positions


def test_height_width_and_aspect_ratio_matter() -> None:
    model, given = randomised(MS), inputs(MS)
    want = model(**given)
    for name, other in (("hw", given["hw"].flip(1)), ("ar", 1 / given["ar"])):
        changed = (model(**given | {name: other}) - want).abs().amax(dim=(1, 2, 3, 4))
        assert changed[0] > 1e-4, name
        assert changed[1] < 1e-6, name  # a square stays what it is
    one = {k: v[:1] for k, v in given.items()}
    tiled = model(**given | {"hw": one["hw"], "ar": one["ar"]})
    close(tiled[:1], want[:1])


def test_positions_stretch_to_the_size_that_was_trained() -> None:
    table = randomised(ALPHA).recomputed_tensors()["pos_embed"]
    assert table.shape == (1, 16, 48)
    model = randomised(dataclasses.replace(ALPHA, input_size=(1, 16, 16), base_size=8))
    larger = model.recomputed_tensors()["pos_embed"].view(8, 8, 48)
    close(larger[::2, ::2], table.view(4, 4, 48), 1e-6)


def test_positions_in_time() -> None:
    for config, same in ((ALPHA, True), (VIDEO, False)):
        model, given = randomised(config), inputs(config)
        turned = model(**given | {"x": given["x"].flip(2)}).flip(2)
        assert bool((turned - model(**given)).abs().max() < 1e-4) is same


# Fewer keys


@pytest.mark.parametrize(
    ("sampling", "keys"), [("conv", 12), ("ave", 12), ("uniform", 12), ("uniform_every", 35)]
)
def test_keys_that_are_left(sampling: str, keys: int) -> None:
    config = sigma(sampling)
    assert config.kv_compress is not None
    attention = CompressedSelfAttention(config, config.kv_compress)
    initialise_alone(attention)
    grid = (2, 5, 7)
    x = torch.randn(3, 70, 48, generator=torch.Generator().manual_seed(0))
    seen = []
    attend = attention.attend
    attention.attend = lambda q, k, v, *, backend: (
        seen.extend((q, k, v)),
        attend(q, k, v, backend=backend),
    )[1]
    attention(x, grid)
    assert [t.shape[1] for t in seen] == [70, keys, keys]
    assert config.kv_compress.keys(grid) == keys
    if sampling in ("ave", "uniform"):
        v = attention.qkv(x).chunk(3, dim=-1)[2].view(3, 2, 5, 7, 48)
        chosen = v[:, :, [0, 2]][:, :, :, [0, 2, 4]]
        close(seen[2].flatten(2), chosen.flatten(1, 3), 0.0)
    if sampling == "conv":  # as initialised: the normalised mean of each square
        v = attention.qkv(x).chunk(3, dim=-1)[2].view(6, 5, 7, 48).permute(0, 3, 1, 2)
        means = F.layer_norm(F.avg_pool2d(v, 2).permute(0, 2, 3, 1), (48,))
        close(seen[2].flatten(2), means.reshape(3, 12, 48))


def initialise_alone(attention: CompressedSelfAttention) -> None:
    model = build_transformer(dataclasses.replace(SIGMA), torch.Generator().manual_seed(0))
    assert isinstance(model, PixArt)
    state = model.blocks[1].attn.state_dict()
    attention.load_state_dict({k: state[k] for k in attention.state_dict()})


def test_shortening_the_keys_of_equal_tokens_changes_nothing() -> None:
    """All keys and values alike: one is as good as many."""
    model, full = randomised(sigma("uniform")), randomised(dataclasses.replace(ALPHA, qk_norm=True))
    full.load_state_dict(model.state_dict())
    tokens = torch.randn(2, 1, 48, generator=torch.Generator().manual_seed(0)).expand(-1, 24, -1)
    one, other = model.blocks[1].attn, full.blocks[1].attn
    close(one(tokens, (2, 3, 4)), other(tokens))


def test_latent_too_small_for_fewer_keys() -> None:
    with pytest.raises(KinemaError, match="1x4 tokens is too small") as caught:
        randomised(SIGMA)(**inputs(SIGMA, latent=(1, 2, 8)))
    assert "at least 4x4" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_compress": {"kv_compress_layer": [2]}}, "names block 2, but the last of 2 is 1"),
        ({"kv_compress": {"kv_compress_layer": []}}, "at least 1"),
        ({"kv_compress": {"kv_compress_layer": [0], "scale_factor": 1}}, "scale_factor"),
        ({"size_conditions": True, "hidden_size": 40}, "multiple of 3"),
    ],
)
def test_settings_without_effect_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(PixArtConfig, SMALL | wrong)


@ALL
def test_settings_survive_json(config: PixArtConfig) -> None:
    assert from_dict(PixArtConfig, to_dict(config)) == config


# Text


def test_text_dropped_and_stand_in() -> None:
    model, given = randomised(ALPHA), inputs(ALPHA)
    drop = torch.tensor([True, False, True])
    y, null = model.drop_text(given["y"], drop), model.null_text(2)
    assert null.shape == (2, 1, 10, 20)
    assert torch.equal(y[drop], null)
    assert torch.equal(y[1], given["y"][1])


def test_features_of_another_encoder() -> None:
    with pytest.raises(KinemaError, match="7 wide, the model takes 20"):
        randomised(ALPHA)(**inputs(ALPHA) | {"y": torch.zeros(3, 1, 10, 7)})


# Initial values, dtypes, work, gradients


@ALL
def test_initialise_sets_everything(config: PixArtConfig) -> None:
    state = torch.random.get_rng_state()
    models = [build_transformer(config, torch.Generator().manual_seed(s)) for s in (7, 7)]
    assert torch.equal(torch.random.get_rng_state(), state)  # PyTorch's own is not touched
    model, reference = models
    assert isinstance(model, PixArt)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.fill_(float("nan"))
    initialise(model, torch.Generator().manual_seed(7))
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
        silent = name.endswith("bias") or name.startswith("final_layer.linear")
        silent |= name.endswith("cross_attn.proj.weight")
        assert bool(value.any()) is not silent, name
        if name.startswith(("t_", "csize", "ar_", "y_embedder.y_proj")) and not silent:
            assert float(value.std()) == pytest.approx(0.02, rel=0.2), name
    assert not model(**inputs(config)).any()


@ALL
def test_meta_model_takes_weights(config: PixArtConfig) -> None:
    source = randomised(config)
    with torch.device("meta"):
        model = build_transformer(config)
    assert all(t.is_meta for t in model.state_dict().values())
    model.load_state_dict(source.state_dict(), assign=True)
    close(model(**inputs(config)), source(**inputs(config)), 0.0)


@ALL
@torch.no_grad()
def test_half_precision(config: PixArtConfig) -> None:
    given = inputs(config)
    model = randomised(config)
    seen = []
    model.final_layer.register_forward_pre_hook(lambda _, a: seen.append(a[0].dtype))
    want = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**given)
    assert seen == [torch.float32] * 2  # the residual stream stays exact under autocast
    half = randomised(config).to(torch.bfloat16)
    for got in (mixed, half(**given)):
        assert got.dtype == torch.float32
        assert float((got - want).std() / want.std()) < 0.03
    # bf16 holds neither timestep; they must still be told apart.
    a, b = (half(**given | {"timestep": torch.full((3,), t)}) for t in (990.0, 991.0))
    assert not torch.equal(a, b)


FLOPS = [ALPHA, MS, SIGMA, sigma("uniform"), sigma("uniform_every", 3), sigma("conv", 3)]


@pytest.mark.parametrize("config", FLOPS)
@pytest.mark.parametrize("latent", [(1, 6, 8), (2, 7, 9)])
@pytest.mark.parametrize("tokens", [1, 10])
def test_flops_of_one_sample(config: PixArtConfig, latent: LatentSize, tokens: int) -> None:
    given = inputs(config, batch=1, latent=latent)
    given["mask"] = torch.arange(10)[None] < tokens
    model = build_transformer(config)
    with FlopCounterMode(display=False) as counter:
        model(**given)
    predicted = config.forward_flops(latent, tokens)
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_at_full_size() -> None:
    config = PixArtConfig(attention="math")
    with torch.device("meta"):
        model = build_transformer(config)
        x, timestep = torch.empty(1, 4, 1, 64, 64), torch.empty(1)
        y = torch.empty(1, 1, 120, 4096)
    with FlopCounterMode(display=False) as counter:
        model(x, timestep, y, mask=torch.arange(120, device="cpu")[None] < 40)
    counted = counter.get_total_flops()
    assert config.forward_flops((1, 64, 64), 40) == pytest.approx(counted, rel=1e-3)


@ALL
def test_everything_gets_a_gradient(config: PixArtConfig) -> None:
    model = randomised(config)
    model(**inputs(config)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
