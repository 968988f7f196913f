"""Every recipe that comes with the package is right, and every mistake in it is found."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kinema.config.errors import ConfigError
from kinema.config.recipe import dump_recipe, load_recipe, read_source, recipe_names
from kinema.config.settings import to_dict
from kinema.data.buckets import BucketTable
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost

NAMES = recipe_names()
FREE_KEYS = ("buckets",)
"""Below these, keys are values of the person's choice and no fields."""


def _fields(data: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in data.items():
        yield (*at, str(key))
        if isinstance(value, dict) and key not in FREE_KEYS:
            yield from _fields(value, (*at, str(key)))


def _mistype(key: str) -> str:
    """The last letter twice."""
    return key + key[-1]


def _written(data: dict[str, Any], folder: Path) -> Path:
    path = folder / "mistyped.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def _parent(data: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path[:-1]:
        data = data[key]
    return data


@pytest.mark.parametrize("name", NAMES)
def test_mistyping_any_key_is_refused_with_the_right_name(name: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(read_source(name).data))
    paths = list(_fields(data))
    assert len(paths) > 20
    for path in paths:
        wrong = copy.deepcopy(data)
        parent = _parent(wrong, path)
        typo = _mistype(path[-1])
        # The mistyped key in its place; a required one is then missing besides.
        replaced = {typo if k == path[-1] else k: v for k, v in parent.items()}
        parent.clear()
        parent.update(replaced)
        file = _written(wrong, tmp_path)
        with pytest.raises(ConfigError) as caught:
            load_recipe(str(file), TrainRecipe)
        message = str(caught.value)
        if path[-1] == "type":  # without its type a union cannot tell which keys are right
            assert "type" in message, path
        else:
            assert f"did you mean {path[-1]!r}" in message, (path, message)
            assert repr(typo) in message, path
        assert str(file) in message, path


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_the_wrong_type_is_refused_at_its_key(name: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(read_source(name).data))
    for path in _fields(data):
        wrong = copy.deepcopy(data)
        value = _parent(wrong, path)[path[-1]]
        _parent(wrong, path)[path[-1]] = ["no"] if isinstance(value, (dict, str)) else {"no": 1}
        file = _written(wrong, tmp_path)
        with pytest.raises(ConfigError) as caught:
            load_recipe(str(file), TrainRecipe)
        assert str(file) in str(caught.value), path
        assert path[0] in str(caught.value), path


@pytest.mark.parametrize("name", NAMES)
def test_a_dumped_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, TrainRecipe)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert load_recipe(str(file), TrainRecipe) == recipe
    assert to_dict(load_recipe(str(file), TrainRecipe)) == to_dict(recipe)


@pytest.mark.parametrize("name", NAMES)
def test_every_bucket_has_a_cost(name: str) -> None:
    recipe = load_recipe(name, TrainRecipe)
    cost = bucket_cost(recipe)
    costs = {b: cost(b) for b in BucketTable.from_config(recipe.data).buckets}
    assert costs
    assert all(value > 0 for value in costs.values())


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("tiny/world", "text.max_tokens=12", "max_tokens"),
        ("tiny/world", "text.dim=12", "caption_channels"),
        ("tiny/world", "model.in_channels=3", "in_channels"),
        ("tiny/world", "model.skip_y_embedder=true", "skip_y_embedder"),
        ("tiny/world", "diffusion=null", "diffusion"),
        ("tiny/vae", "ema_decay=0.9", "ema_decay"),
        ("tiny/vae", "vae_weights=somewhere", "vae_weights"),
        ("tiny/vae", "text_cache=somewhere", "text_cache"),
        ("tiny/world", "accumulation=0", "accumulation"),
        ("tiny/world", "max_steps=0", "max_steps"),
        ("tiny/world", "keep_checkpoints=0", "keep_checkpoints"),
        ("tiny/world", "ema_decay=1.0", "ema_decay"),
        ("tiny/world", "name=a/b", "name"),
        ("tiny/world", "seed=-1", "seed"),
        ("tiny/world", "optim.lr=0", "lr"),
        ("tiny/world", "optim.betas=[0.9, 1.0]", "betas"),
        ("tiny/world", "optim.grad_clip=0", "grad_clip"),
        ("tiny/world", "optim.schedule.warmup_steps=-1", "warmup_steps"),
        ("tiny/world", "precision=fp64", "precision"),
        ("tiny/vae", "task.kl_weight=-1", "kl_weight"),
        ("tiny/vae", "vae=!replace {type: autoencoder-kl}", "video autoencoders"),
        ("tiny/vae", "text_weights=somewhere", "text_weights"),
        ("tiny/world", "diffusion=!replace {type: iddpm}", "pred_sigma"),
        ("tiny/world", "text_weights=somewhere", "has no weights"),
        ("tiny/smoke-1.0", "model.pred_sigma=false", "pred_sigma"),
        ("tiny/smoke-1.0", "diffusion.cfg_channel=5", "cfg_channel"),
        ("tiny/smoke-1.0", "diffusion.num_timesteps=20", "at least 21"),
        ("tiny/smoke-1.0", "text=!replace {type: classes, num_classes: 10}", "tokens of a caption"),
        ("tiny/smoke-1.0", "vae.vae_2d.latent_channels=3", "in_channels"),
        ("tiny/smoke-dit", "task.masks={image_head: 0.5}", "frames clean"),
        ("tiny/smoke-1.1", "model.patch_size=[2, 2, 2]", "frames clean"),
        ("tiny/smoke-dit", "text.num_classes=11", "10 classes"),
        ("tiny/smoke-dit", "text_cache=somewhere", "text_cache"),
        ("opensora-1.2/stage1", "preview={every: 9, prompts: [a]}", "text_weights"),
    ],
)
def test_settings_that_contradict_or_do_nothing_are_refused(
    name: str, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(name, TrainRecipe, [override])
