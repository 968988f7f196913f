"""`kinema text`: captions encoded once, before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kinema.cli.overrides import FREE

text_app = typer.Typer(
    help="Text embeddings: work them out once.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    app.add_typer(text_app, name="text")


@text_app.callback()
def group() -> None:
    """A callback, so that `encode` stays a command of a group."""


@text_app.command(context_settings=FREE)
def encode(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help=".csv or .parquet")],
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Recipe whose text encoder is used.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe: text.dim=128."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
) -> None:
    """Encode the captions of a manifest; `text_cache=FOLDER` then trains from them."""
    from kinema.config.errors import ConfigError
    from kinema.config.recipe import load_recipe
    from kinema.data.manifest import Manifest
    from kinema.training.config import TrainRecipe
    from kinema.training.encode import write_text_cache

    config = load_recipe(recipe, TrainRecipe, overrides or []).text
    if config is None:
        raise ConfigError("this recipe has no text encoder", where=recipe)
    write_text_cache(Manifest.read(manifest), config, output, dtype=dtype)
    print(output)
