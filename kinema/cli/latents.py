"""`kinema latents`: videos encoded once, before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinema.cli.overrides import FREE

if TYPE_CHECKING:
    from kinema.data.manifest import Manifest
    from kinema.training.config import TrainRecipe

latents_app = typer.Typer(
    help="Latents of videos: work them out once.", no_args_is_help=True, rich_markup_mode=None
)

Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe that will train on them: name or file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.", show_default=False),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder of the cache.")]
DataPath = Annotated[
    str | None, typer.Option(help="Manifest of the clips; the recipe's own by default.")
]
DataRoot = Annotated[
    str | None, typer.Option(help="Folder that the manifest's paths are relative to.")
]
DType = Annotated[str, typer.Option(help="float16 or float32.")]


def register(app: typer.Typer) -> None:
    app.add_typer(latents_app, name="latents")


@latents_app.command(context_settings=FREE)
def encode(
    recipe: Recipe,
    output: Output,
    overrides: Overrides = None,
    data_path: DataPath = None,
    data_root: DataRoot = None,
    resolution: Annotated[
        list[str] | None,
        typer.Option(help="Only this resolution of the recipe; may be given several times."),
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="All frames of each clip, rather than as many as its longest bucket takes.",
        ),
    ] = False,
    dtype: DType = "float16",
    clips_per_file: Annotated[
        int, typer.Option(min=1, help="Clips of a file: so much is lost by an interruption.")
    ] = 64,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU where there is one by default.")
    ] = None,
) -> None:
    """Encode the clips of a manifest for `latent_cache=FOLDER`, alone or by torchrun's processes.

    The same command goes on after an interruption, and takes in more resolutions.
    """
    from kinema.cli.this_machine import refuse_url
    from kinema.parallel.world import open_world
    from kinema.training.encode_latents import encode_latents
    from kinema.training.parts import load_vae

    refuse_url(output, "the cache", hint="write it here; copy it to the store then")
    found, manifest = _read(recipe, overrides, data_path, data_root)
    with open_world(device) as world:
        vae, _ = load_vae(found, world.device)
        done = encode_latents(
            found,
            manifest,
            vae,
            output,
            world,
            resolutions=resolution or (),
            whole=whole,
            dtype=dtype,
            clips_per_file=clips_per_file,
        )
        if world.is_main:
            print(f"{done.new} clips encoded, {len(done.unreadable)} left out as unreadable")
            _summary(output, done.clips)


@latents_app.command("import", context_settings=FREE)
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of .npz files named as the videos, or of latent_HEIGHTxWIDTH folders.",
        ),
    ],
    recipe: Recipe,
    output: Output,
    overrides: Overrides = None,
    data_path: DataPath = None,
    data_root: DataRoot = None,
    dtype: DType = "float16",
) -> None:
    """Take over latents that the MindSpore port of Open-Sora wrote (`infer_vae.py`)."""
    from kinema.training.import_latents import import_npz

    found, manifest = _read(recipe, overrides, data_path, data_root)
    done = import_npz(found, manifest, source, output, dtype=dtype)
    print(f"{done.new} clips taken over, {done.missing} of the manifest have no file")
    _summary(output, done.clips)


def _read(
    recipe: str, overrides: list[str] | None, data_path: str | None, data_root: str | None
) -> tuple[TrainRecipe, Manifest]:
    from kinema.config.errors import ConfigError
    from kinema.config.recipe import load_recipe
    from kinema.data.manifest import Manifest
    from kinema.training.config import TrainRecipe

    found = load_recipe(recipe, TrainRecipe, overrides or [])
    if found.model is None:
        raise ConfigError("this recipe trains an autoencoder, not on latents", where=recipe)
    path = data_path or found.data.path
    if path is None:
        raise ConfigError("no manifest is named", where="data.path", hint="--data-path MANIFEST")
    return found, Manifest.read(path, data_root=data_root or found.data.root)


def _summary(output: Path, clips: dict[tuple[int, int], int]) -> None:
    for (height, width), count in clips.items():
        folder = output / f"latent_{height}x{width}"
        nbytes = sum(file.stat().st_size for file in folder.iterdir())
        print(f"  {folder.name}: {count:,} clips, {nbytes / 1e9:.3g} GB")
    print(output)
