"""What `kinema cluster launch` is to train: the words of `kinema train`, understood here first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Training:
    """A training command.

    Attributes:
        words: after `kinema`.
        environment: the recipe's.
        paths: files and folders that every node must have.
        outputs: where it writes.
    """

    words: tuple[str, ...]
    environment: dict[str, str]
    paths: tuple[str, ...]
    outputs: str


def understand(words: Sequence[str]) -> Training:
    """Read the recipe that `kinema train WORDS` would train.

    Raises:
        KinemaError: a recipe, option or setting that is wrong.
    """
    from kinema.config.errors import ConfigError
    from kinema.config.recipe import load_recipe
    from kinema.training.config import RANDOM_WEIGHTS, TrainRecipe

    options = _parse(words)
    name, load = options["recipe"], options["load"]
    if name is None and load is None:
        raise ConfigError("needs a recipe", hint="kinema cluster launch RECIPE --data-path M")
    if name is None:
        run = load if (load / "recipe.yaml").is_file() else load.parent
        name = str(run / "recipe.yaml")
    recipe = load_recipe(name, TrainRecipe, options["changes"])
    paths = [
        *(recipe.data.path, recipe.data.root, recipe.text_weights, recipe.text_cache),
        *(recipe.latent_cache, recipe.validation.path if recipe.validation else None),
        *(options["ckpt_path"], load),
        None if recipe.vae_weights == RANDOM_WEIGHTS else recipe.vae_weights,
        name if name.endswith((".yaml", ".yml")) or Path(name).is_file() else None,
    ]
    command = "train-vae" if recipe.task.type == "vae" else "train"
    return Training(
        (command, *words),
        dict(recipe.environment),
        tuple(dict.fromkeys(str(path) for path in paths if path is not None)),
        recipe.outputs,
    )


def _parse(words: Sequence[str]) -> dict[str, Any]:
    """The options of `kinema train`, and its changes to the recipe."""
    import typer

    from kinema.cli.train import changes_of, split
    from kinema.cli.train import register as register_train

    app = typer.Typer(add_completion=False)
    register_train(app)
    group: Any = typer.main.get_command(app)
    train = group.commands["train"]
    with train.make_context("kinema train", list(words)) as context:
        given = dict(context.params)
        extra = list(context.args)
    recipe, overrides = split(given["recipe"], [*(given["overrides"] or []), *extra])
    changes = changes_of(overrides, given["data_path"], given["data_root"], given["outputs"])
    return {**given, "recipe": recipe, "changes": changes}
