"""`kinema text`: captions encoded once, before training or generating."""

from __future__ import annotations

import sys
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
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Recipe whose text encoder is used.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe: text.precision=int8."),
    ] = None,
    data_path: Annotated[
        str | None,
        typer.Option(help="Manifest whose captions are encoded; the recipe's own by default."),
    ] = None,
    prompt_path: Annotated[
        Path | None, typer.Option(help="Text file with a prompt per line, in place of a manifest.")
    ] = None,
    text_weights: Annotated[
        str | None,
        typer.Option(
            help="T5 and its tokenizer: a folder, or a repository of the hub such as "
            "DeepFloyd/t5-v1_1-xxl."
        ),
    ] = None,
    aes: Annotated[
        float | None, typer.Option(help="Aesthetic score: prompts are encoded with it as well.")
    ] = None,
    flow: Annotated[float | None, typer.Option(help="Motion score, likewise.")] = None,
    camera_motion: Annotated[str | None, typer.Option(help="Camera motion, likewise.")] = None,
    dtype: Annotated[str, typer.Option(help="float16 or float32.")] = "float16",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU where there is one by default.")
    ] = None,
) -> None:
    """Encode captions once: of a manifest for training (`text_cache=FOLDER`), or prompts.

    The same command goes on after an interruption.
    """
    from kinema.cli.this_machine import refuse_url
    from kinema.config.errors import ConfigError
    from kinema.config.recipe import load_recipe
    from kinema.data.manifest import Manifest
    from kinema.generation.prompts import add_scores, read_prompts, split_segments
    from kinema.models.build import build_text_encoder
    from kinema.parallel.world import open_world
    from kinema.training.config import TrainRecipe
    from kinema.training.encode import write_text_cache

    refuse_url(output, "the cache", hint="write it here; copy it to the store then")
    found = load_recipe(recipe, TrainRecipe, overrides or [])
    if found.text is None:
        raise ConfigError("this recipe has no text encoder", where=recipe)
    if data_path is not None and prompt_path is not None:
        raise ConfigError("both name captions: give one", where="--data-path, --prompt-path")
    scores = (aes, flow, camera_motion)
    if prompt_path is not None:
        texts = [t for line in read_prompts(prompt_path) for t in split_segments(line.text)[0]]
        # Scores go with prompts, but not with negative ones: both forms are there.
        captions: Manifest | list[str] = list(
            dict.fromkeys([*texts, *(add_scores(t, *scores) for t in texts)])
        )
    else:
        if any(score is not None for score in scores):
            raise ConfigError(
                "scores belong to prompts; a manifest's captions have their own",
                where="--aes, --flow, --camera-motion",
                hint="--prompt-path FILE",
            )
        manifest = data_path or found.data.path
        if manifest is None:
            raise ConfigError(
                "no captions are named",
                where="kinema text encode",
                hint="--data-path MANIFEST, or --prompt-path FILE",
            )
        captions = Manifest.read(manifest)
    folder = _folder(text_weights or found.text_weights)
    with open_world(device) as world:
        if world.size > 1:
            raise ConfigError("captions are encoded by one process", hint="run it without torchrun")
        encoder = build_text_encoder(found.text, folder)
        encoder.to(world.device)
        cut = write_text_cache(captions, encoder, output, dtype=dtype)
    if cut is not None:
        more = f" (and {cut.count - 1} more captions)" if cut.count > 1 else ""
        print(
            f"warning: caption {cut.row}{more} is longer than {found.text.max_tokens} tokens; "
            f"this is lost: {cut.lost}",
            file=sys.stderr,
        )
    print(output)


def _folder(given: str | None) -> Path | None:
    """The text encoder's folder, downloaded first if a repository is named.

    Raises:
        KinemaError: not there, or it cannot be downloaded.
    """
    from kinema.checkpoint.hub import resolve
    from kinema.checkpoint.places import Wanted
    from kinema.generation.released import T5_XXL

    if given is None:
        return None
    wanted = Wanted("the text encoder", "--text-weights", T5_XXL, given, folder=True)
    return resolve({"text": wanted})["text"]
