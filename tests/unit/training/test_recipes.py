"""Every recipe that comes with the package is right, and every mistake in it is found."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kinema.config.errors import ConfigError
from kinema.config.recipe import (
    dump_recipe,
    find_recipe,
    load_recipe,
    read_source,
    recipe_names,
)
from kinema.config.settings import to_dict
from kinema.data.buckets import BucketTable
from kinema.models.config import STDiT3Config
from kinema.training.config import (
    OneCycleSchedule,
    TextToVideoTask,
    TrainRecipe,
    WarmupSchedule,
)
from kinema.training.cost import bucket_cost
from kinema.training.parts import build_model

NAMES = [name for name in recipe_names() if not name.startswith("curate/")]
PUBLISHED = json.loads(Path(__file__).with_name("published_recipes.json").read_text())
"""What was published: values by their published names, buckets and masks by ours. The text that
came with the files wins where they differ: epochs of the speed run's stages 4 to 7."""
ADAPTATION = {
    "1-multi-resolution": 20_000, "2-qk-norm": 18_000, "3-rectified-flow": 10_000,
    "4-logit-normal": 33_000, "5-epsilon": 8_000, "6-vae-fps": 25_000,
    "7-temporal-images": 3_000, "8-video": 38_000,
}  # fmt: skip
"""Published steps of the preparatory adaptation."""
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


def _first_seen() -> list[tuple[str, list[tuple[str, ...]]]]:
    """Recipes with the keys that none before has: together every key that any of them has, in every
    kind of settings that it stands in."""
    seen: set[tuple[object, ...]] = set()
    chosen = []
    for name in NAMES:
        data = read_source(name).data
        kinds = {path: (path, _parent(data, path).get("type")) for path in _fields(data)}
        new = [path for path, kind in kinds.items() if kind not in seen]
        if new:
            chosen.append((name, new))
            seen.update(kinds.values())
    return chosen


FIRST_SEEN = _first_seen()
assert sum(len(paths) for _, paths in FIRST_SEEN) > 100


@pytest.mark.parametrize(("name", "paths"), FIRST_SEEN, ids=[name for name, _ in FIRST_SEEN])
def test_mistyping_any_key_is_refused_with_the_right_name(
    name: str, paths: list[tuple[str, ...]], tmp_path: Path
) -> None:
    data = json.loads(json.dumps(read_source(name).data))
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


@pytest.mark.parametrize(("name", "paths"), FIRST_SEEN, ids=[name for name, _ in FIRST_SEEN])
def test_a_value_of_the_wrong_type_is_refused_at_its_key(
    name: str, paths: list[tuple[str, ...]], tmp_path: Path
) -> None:
    data = json.loads(json.dumps(read_source(name).data))
    for path in paths:
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


def _buckets(recipe: TrainRecipe) -> dict[str, dict[int, tuple[object, object]]]:
    return {
        name: {
            frames: (keep if isinstance(keep, float) else tuple(keep), batch)
            for frames, (keep, batch) in lengths.items()
        }
        for name, lengths in recipe.data.buckets.items()
    }


def _published_buckets(key: str) -> dict[str, dict[int, tuple[object, object]]]:
    return {
        name: {
            int(frames): (keep if isinstance(keep, float) else tuple(keep), batch)
            for frames, (keep, batch) in lengths.items()
        }
        for name, lengths in PUBLISHED["buckets"][key].items()
    }


SMALLER_PORTIONS = {"opensora-1.0/16x512x512": 32, "opensora-1.0/360x512x512": 32}
"""Frames that are encoded at once, where ours differ: the published number does not fit 80 GB."""

TYPES = {
    "STDiT-XL/2": "stdit", "STDiT2-XL/2": "stdit2", "STDiT3-XL/2": "stdit3",
    "VideoAutoencoderKL": "autoencoder-kl", "OpenSoraVAE_V1_2": "opensora-vae-1.2",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED["recipes"])
def test_every_published_value_is_in_the_recipe(name: str) -> None:
    given, recipe = dict(PUBLISHED["recipes"][name]), load_recipe(name, TrainRecipe)
    assert isinstance(recipe.task, TextToVideoTask)
    assert recipe.model is not None
    assert recipe.text is not None
    assert recipe.diffusion is not None
    data, optim, schedule = recipe.data, recipe.optim, recipe.optim.schedule
    if "buckets" in given:
        assert _buckets(recipe) == _published_buckets(given.pop("buckets"))
    masks = PUBLISHED["masks"][given.pop("masks")] if "masks" in given else {}
    ours = recipe.task.masks.ratios()
    assert {k: v for k, v in ours.items() if v and k != "identity"} == pytest.approx(masks)
    for part, key in (
        (recipe.model, "model"),
        (recipe.vae, "vae"),
        (recipe.diffusion, "diffusion"),
    ):
        if key in given:
            kind, values = given.pop(key)
            if key == "vae" and name in SMALLER_PORTIONS:
                assert values == {"micro_batch_size": 128}
                values = {"micro_batch_size": SMALLER_PORTIONS[name]}
            assert part.type == TYPES.get(kind, kind)
            assert {k: getattr(part, k) for k in values} == values
    assert recipe.text.max_tokens == given.pop("text")
    plugin = given.pop("plugin")
    assert recipe.parallel.shard == plugin.removesuffix("-seq")
    assert recipe.parallel.sequence == given.pop("sp_size", 1)
    assert (recipe.parallel.sequence > 1) == plugin.endswith("-seq")
    assert recipe.recompute == ("full" if given.pop("grad_checkpoint") else "none")
    if given.pop("lr_schedule", None):
        assert isinstance(schedule, OneCycleSchedule)
        assert (given.pop("anneal_strategy"), schedule.anneal) == ("cos", "cosine")
        assert schedule.cooldown_steps == given.pop("cooldown_steps")
        assert schedule.min_lr == given.pop("min_lr")
        assert schedule.max_lr == given.pop("max_lr")
    else:
        assert isinstance(schedule, WarmupSchedule)
    assert schedule.warmup_steps == given.pop("warmup_steps", 0)
    assert data.frame_interval == given.pop("frame_interval")
    assert data.num_workers == given.pop("num_workers")
    assert (optim.lr, optim.grad_clip) == (given.pop("lr"), given.pop("grad_clip"))
    assert optim.eps == given.pop("adam_eps", 1e-8)
    assert optim.weight_decay == given.pop("weight_decay", 0)
    assert recipe.ema_decay == given.pop("ema_decay", 0.9999)
    assert recipe.precision == given.pop("dtype")
    for key in ("seed", "outputs", "epochs", "log_every", "ckpt_every"):
        assert getattr(recipe, key) == given.pop(key), key
    assert not given, "every published value was looked at"


def test_the_adaptation_takes_the_published_steps() -> None:
    found = {
        name.rpartition("/")[2]: load_recipe(name, TrainRecipe).max_steps
        for name in NAMES
        if name.startswith("opensora-1.2/adapt/")
    }
    assert found == ADAPTATION


def test_each_adaptation_step_trains_what_its_text_says() -> None:
    """On small models: what the freezing leaves, and what each step brings."""
    trained = {}
    for name in ADAPTATION:
        full = load_recipe(f"opensora-1.2/adapt/{name}", TrainRecipe)
        assert isinstance(full.model, STDiT3Config)
        small = replace(full.model, depth=1, hidden_size=32, num_heads=2)
        with torch.device("meta"):
            model = build_model(replace(full, model=small))
        trained[name] = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        steps = list(ADAPTATION)
        assert full.model.qk_norm == (name != steps[0])
        assert (full.diffusion is not None and full.diffusion.type == "rflow") == (
            name in steps[2:]
        )
        assert (full.vae.type == "opensora-vae-1.2") == (name in steps[5:])
        images = all(list(lengths) == [1] for lengths in full.data.buckets.values())
        assert images == (name != steps[7])
    assert "temporal_blocks" not in trained["1-multi-resolution"]
    assert "fps_embedder" not in trained["5-epsilon"]
    assert "fps_embedder" in trained["6-vae-fps"]
    assert "temporal_blocks" not in trained["6-vae-fps"]
    assert {"spatial_blocks", "temporal_blocks"} <= trained["7-temporal-images"]
    assert trained["8-video"] == {"temporal_blocks"}


def test_every_named_recipe_says_what_it_starts_from() -> None:
    for name in NAMES:
        if not name.startswith("tiny/"):
            comments = [t for t in find_recipe(name).read_text().splitlines() if t.startswith("#")]
            assert "Starts" in " ".join(comments), name
