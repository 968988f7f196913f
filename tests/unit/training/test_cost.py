"""The one formula of a step's cost."""

from __future__ import annotations

import pytest

from kinema.config.recipe import load_recipe
from kinema.data.buckets import Bucket
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost, tokens_per_clip

WORLD = Bucket(0, "64x64", 17, 1.0, 64, 64, 8)


def cost(*overrides: str, name: str = "opensora-1.2/stage1") -> float:
    return bucket_cost(load_recipe(name, TrainRecipe, list(overrides)))(WORLD)


def test_text_to_video_is_model_autoencoder_and_text_encoder() -> None:
    recipe = load_recipe("opensora-1.2/stage1", TrainRecipe)
    assert recipe.model is not None
    assert recipe.text is not None
    assert recipe.recompute == "full"
    forward = recipe.model.forward_flops(recipe.vae.latent_size(17, 64, 64), 300)
    encode = recipe.vae.encode_flops(17, 64, 64)
    text = recipe.text.encode_flops()
    assert text > 0
    assert cost() == pytest.approx(4 * forward + encode + text)
    assert cost("recompute=none") == pytest.approx(3 * forward + encode + text)
    every_third = "recompute_every=3"  # of 28 blocks in space, and of as many in time
    assert cost(every_third) == pytest.approx((3 + 10 / 28) * forward + encode + text)
    widening = recipe.model.widening_flops(recipe.vae.latent_size(17, 64, 64), 300)
    assert cost("recompute=selective") == pytest.approx(3 * forward + widening + encode + text)
    assert 0.3 * forward < widening < 0.7 * forward
    assert cost("text_cache=somewhere") == pytest.approx(4 * forward + encode)
    assert cost("latent_cache=somewhere") == pytest.approx(4 * forward + text)


def test_an_autoencoder_encodes_and_decodes() -> None:
    vae = load_recipe("tiny/vae", TrainRecipe).vae
    both = vae.encode_flops(17, 64, 64) + vae.decode_flops(17, 64, 64)
    assert cost(name="tiny/vae") == pytest.approx(3 * both)
    assert cost("recompute=full", name="tiny/vae") == pytest.approx(4 * both)
    assert cost("recompute=full", "recompute_every=2", name="tiny/vae") == pytest.approx(3.5 * both)
    assert cost("recompute=selective", name="tiny/vae") == pytest.approx(3 * both)


def test_tokens_are_those_of_the_transformer() -> None:
    tokens = tokens_per_clip(load_recipe("tiny/world", TrainRecipe))
    assert tokens is not None
    assert tokens(WORLD) == 5 * 8 * 8
    assert tokens_per_clip(load_recipe("tiny/vae", TrainRecipe)) is None


def test_every_kind_of_model_has_a_cost() -> None:
    for name in ("tiny/smoke-1.0", "tiny/smoke-1.1", "tiny/smoke-dit"):
        recipe = load_recipe(name, TrainRecipe, ["task.remember_latents=false"])
        assert recipe.model is not None
        assert recipe.text is not None
        forward = recipe.model.forward_flops((17, 16, 16), recipe.text.max_tokens)
        encode = recipe.vae.encode_flops(17, 64, 64)
        assert bucket_cost(recipe)(WORLD) == pytest.approx(3 * forward + encode)
        tokens = tokens_per_clip(recipe)
        assert tokens is not None
        assert tokens(WORLD) == 17 * 8 * 8
