"""`kinema weights`: weights in another form, weights from the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from kinema.cli.overrides import FREE


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        name="weights",
        no_args_is_help=True,
        help="Convert weights, verify checkpoints, fetch released ones, start from PixArt.",
    )
    group.command("convert")(convert)
    group.command("verify")(verify)
    group.command("fetch")(fetch)
    group.command("start", context_settings=FREE)(start)
    app.add_typer(group)


def convert(
    source: Path = typer.Argument(
        ..., metavar="SRC", help="A file of weights, a folder of them, or a checkpoint of ours."
    ),
    target: Path = typer.Argument(
        ..., metavar="DST", help="A folder, or a file with the ending of its kind."
    ),
    to: str = typer.Option(
        ...,
        help="kinema (safetensors with the names of Open-Sora), original (as the authors published "
        "it), diffusers.",
    ),
    dtype: str | None = typer.Option(
        None, help="Kind of number to write: fp32, bf16 or fp16; as in the source if not given."
    ),
    model: str | None = typer.Option(
        None, help="Which released checkpoint it is (`kinema models`), where weights do not tell."
    ),
    max_shard_size: str = typer.Option("8GiB", help="Larger safetensors files become shards."),
    ema: bool = typer.Option(False, "--ema", help="The averaged weights of a checkpoint of ours."),
    allow_unexpected: list[str] = typer.Option(
        [],
        help="Tensors (regular expression) that the network has no place for: they are left out.",
        metavar="<str>",
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is there."),
) -> None:
    """Write weights in another form, tensor by tensor, and say what was done."""
    from kinema.checkpoint import convert as conversion
    from kinema.config.errors import KinemaError

    form = next((f for f in conversion.FORMS if f == to), None)
    if form is None:
        raise KinemaError(
            f"{to!r} is no form of weights", where="--to", hint=", ".join(conversion.FORMS)
        )
    done = conversion.convert(
        source,
        target,
        form,
        config=_settings(source, model, "ema" if ema else "model"),
        dtype=dtype,
        max_shard_bytes=conversion.size_in_bytes(max_shard_size),
        section="ema" if ema else "model",
        overwrite=overwrite,
        allow_unexpected=allow_unexpected,
    )
    if done.left_out:
        names = ", ".join(done.left_out)
        print(f"warning: {len(done.left_out)} tensors left out: {names}", file=sys.stderr)
    print(f"{done.title} (found as: {done.layout})")
    print(f"{done.tensors} tensors, {done.numbers:,} numbers")
    if done.computed:
        print(f"left out, because it is computed where it is needed: {', '.join(done.computed)}")
    if done.without_config:
        print(
            "config.json is not written: several checkpoints have these tensors and other "
            "settings; --model NAME says which it is"
        )
    for file in done.files:
        print(file)


def verify(
    source: Path = typer.Argument(
        ..., metavar="RUN", help="A run folder (all its checkpoints) or one checkpoint."
    ),
) -> None:
    """Read checkpoints again and compare every file with what was written; exit code 1 if one
    differs."""
    from kinema.checkpoint.errors import CheckpointError
    from kinema.checkpoint.folder import Checkpoint, checkpoint_folders

    damaged = False
    for folder in checkpoint_folders(source) or [source]:
        try:
            checkpoint = Checkpoint.open(folder)
            checkpoint.verify_shown()
        except CheckpointError as error:
            damaged = True
            print(f"{folder}: {error.what}")
        else:
            print(f"{folder}: whole")
    if damaged:
        raise SystemExit(1)


def fetch(
    name: str = typer.Argument(..., help="A released checkpoint (`kinema models`)."),
    offline: bool = typer.Option(
        False, "--offline", help="Take nothing from the network; say what is missing."
    ),
) -> None:
    """Download the weights of a released checkpoint into the hub's cache; print their places."""
    from kinema.generation.released import find_released, locate

    files = locate(find_released(name), offline=offline)
    print(f"model  {files.model}")
    print(f"vae    {files.vae}")
    if files.text is not None:
        print(f"text   {files.text}")


def start(
    source: Path = typer.Argument(..., metavar="SRC", help="Weights of PixArt-alpha or -Sigma."),
    overrides: list[str] | None = typer.Argument(
        None, metavar="KEY=VALUE", help="Changes to the recipe: model.model_max_length=200."
    ),
    recipe: str = typer.Option("opensora-1.2/stage1", help="Recipe whose model begins with them."),
    save: Path | None = typer.Option(
        None,
        help="Write the model that begins so, as .safetensors; else only say what it would be.",
    ),
    names: bool = typer.Option(False, "--names", help="List every tensor."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is there."),
) -> None:
    """Say what a model takes from PixArt.

    Every tensor is loaded, reshaped, new, or left. `kinema train --ckpt-path` starts so by itself.
    """
    import torch

    from kinema.checkpoint.pixart_start import preview_start, start_from_pixart, takes_pixart
    from kinema.checkpoint.weights import save_weights
    from kinema.config.errors import KinemaError
    from kinema.config.recipe import load_recipe
    from kinema.models.build import build_transformer
    from kinema.training.config import TrainRecipe
    from kinema.training.parts import build_model

    settings = load_recipe(recipe, TrainRecipe, overrides or [])
    model = settings.model
    if model is None:
        raise KinemaError("the recipe trains no transformer", where="--recipe")
    with torch.device("meta"):
        network = build_transformer(model)
    if not takes_pixart(network):
        raise KinemaError(
            f"a model of type {model.type!r} does not start from PixArt",
            where="--recipe",
            hint="stdit, stdit2, stdit3 or pixart",
        )
    report = preview_start(network, source)
    if save is not None:
        if save.exists() and not overwrite:
            raise KinemaError("is there already", where=str(save), hint="--overwrite")
        # Fresh values from the recipe's seed: what training would begin with.
        filled = build_model(settings)
        report = start_from_pixart(filled, source)
        save.parent.mkdir(parents=True, exist_ok=True)
        save_weights(save, filled.state_dict())
    print(report)
    if names:
        for what, tensors in report.names().items():
            print(f"{what}:")
            for name in tensors:
                print(f"  {name}")


def _settings(source: Path, model: str | None, section: str) -> Any:
    """The network's settings: as its checkpoint or a released name says, or as far as the released
    checkpoints with these tensors agree; None: not known."""
    from kinema.checkpoint.examine import described, examine
    from kinema.checkpoint.identify import same_network
    from kinema.config.errors import KinemaError
    from kinema.generation.released import RELEASED, find_released

    own = described(source)
    if own is not None:
        if model is not None:
            raise KinemaError("a checkpoint of ours says itself what it is", where="--model")
        return own
    identity = next((f.identity for f in examine(source) if f.section in ("", section)), None)
    if identity is None or identity.config is None:
        return None  # `convert` says why
    named = RELEASED if model is None else (find_released(model),)
    configs = [c for r in named for c in (r.config.model, r.config.vae.config)]
    fitting = [c for c in configs if same_network(c, identity.config, identity.told)]
    if model is not None and not fitting:
        raise KinemaError(
            f"these weights are not those of {model}: {identity.title}", where=str(source)
        )
    return fitting[0] if fitting and all(c == fitting[0] for c in fitting) else None
