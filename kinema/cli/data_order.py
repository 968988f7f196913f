"""`kinema data explain`, `plan` and `order`: where clips go, and what an epoch will be."""

from __future__ import annotations

import json
import os
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinema.cli.data import DataRoot, ManifestPath, data_app
from kinema.cli.overrides import FREE

if TYPE_CHECKING:
    from kinema.data.manifest import Manifest
    from kinema.data.order import SampleOrder
    from kinema.training.config import TrainRecipe

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="Name or path of a recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.", show_default=False),
]
WorldSize = Annotated[int, typer.Option("--world-size", min=1, help="Number of ranks (GPUs).")]


@data_app.command(context_settings=FREE)
def explain(
    context: typer.Context,
    clip: Annotated[
        str, typer.Argument(metavar="CLIP", help="A file; or with --manifest, a row or a path.")
    ],
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="Name or path of a recipe; without, only why the manifest drops the clip.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    manifest: Annotated[
        str | None, typer.Option(help="Take the clip's size from this manifest.")
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Say where a clip goes under a recipe's buckets, with which probability; or why nowhere.

    With --manifest, also which rule dropped the clip, and the values that the rule looked at.
    """
    from kinema.config.errors import ConfigError
    from kinema.data.buckets import BucketTable
    from kinema.data.explain import explain as explain_size

    if recipe is None:
        if manifest is None:
            raise ConfigError(
                "neither a recipe nor a manifest is given",
                hint="kinema data explain CLIP RECIPE, or kinema data explain CLIP --manifest M",
            )
        title, _, dropped = _clip_size(clip, manifest, data_root)
        print(title)
        for line in dropped or ["not dropped"]:
            print(f"  {line}")
        return
    table = BucketTable.from_config(read_recipe(context, recipe, overrides).data)
    title, size, dropped = _clip_size(clip, manifest, data_root)
    result = explain_size(table, *size)
    print(title)
    for line in result.lines:
        print(f"  {line}")
    for bucket, chance in result.chances:
        print(f"{chance:8.2%}  {bucket}")
    print(f"{result.left_out:8.2%}  left out of an epoch")
    if dropped:
        print(f"but it never trains: the manifest says {dropped[0]}")
        for line in dropped[1:]:
            print(line)


@data_app.command(context_settings=FREE)
def plan(
    context: typer.Context,
    manifest: ManifestPath,
    recipe: Recipe,
    overrides: Overrides = None,
    world_size: WorldSize = 1,
    epoch: Annotated[int, typer.Option(min=0, help="Which epoch, from 0.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, every size apart.")] = False,
    data_root: DataRoot = None,
) -> None:
    """Count what an epoch will be: clips by bucket, clips left out and why, steps, balance, FLOPs.

    Fails when no clip trains.
    """
    from kinema.data.plan import make_plan, render_plan
    from kinema.training.cost import tokens_per_clip

    settings = read_recipe(context, recipe, overrides)
    clips, order = _order(manifest, data_root, settings, world_size)
    result = make_plan(clips, order, epoch=epoch, tokens=tokens_per_clip(settings))
    print(json.dumps(result.to_dict()) if as_json else render_plan(result), end="")
    if as_json:
        print()


@data_app.command(context_settings=FREE)
def order(
    context: typer.Context,
    manifest: ManifestPath,
    recipe: Recipe,
    overrides: Overrides = None,
    world_size: WorldSize = 1,
    epoch: Annotated[int, typer.Option(min=0, help="Which epoch, from 0.")] = 0,
    steps: Annotated[
        str, typer.Option(metavar="A:B", help="Steps A to B-1 only; either may be left out.")
    ] = ":",
    data_root: DataRoot = None,
) -> None:
    """Print which rows train together: one JSON line per step and rank.

    `rows` count from 0 in the manifest, `cost` is in FLOPs. With accumulation, `micro` tells a
    rank's micro-batches of one step apart. `repeated` marks a micro-batch that stands a second
    time, because there are fewer rows than ranks; it does not count in the loss.
    """
    settings = read_recipe(context, recipe, overrides)
    _, orders = _order(manifest, data_root, settings, world_size)
    laid = orders.epoch(epoch)
    for step in _steps(steps, laid.num_steps):
        for rank in range(world_size):
            for micro in range(settings.accumulation):
                batch = laid.micro_batch(step, rank, micro)
                line: dict[str, Any] = {"step": step, "rank": rank}
                if settings.accumulation > 1:
                    line["micro"] = micro
                bucket = batch.bucket
                line |= {
                    "num_frames": bucket.frames, "height": bucket.height, "width": bucket.width,
                    "rows": batch.rows.tolist(), "cost": batch.cost,
                }  # fmt: skip
                if batch.repeated:
                    line["repeated"] = True
                print(json.dumps(line))


def read_recipe(context: typer.Context, name: str, overrides: list[str] | None) -> TrainRecipe:
    """The recipe of a command whose own options may have been mistyped.

    Raises:
        ConfigError: names the option that was likely meant.
    """
    from kinema.config.errors import ConfigError
    from kinema.config.recipe import load_recipe
    from kinema.training.config import TrainRecipe

    try:
        return load_recipe(name, TrainRecipe, overrides or [])
    except ConfigError as error:
        near = _near_option(context, overrides or [])
        if error.where and error.where.startswith("command line") and near and not error.hint:
            raise ConfigError(error.what, where=error.where, hint=near) from None
        raise


def _near_option(context: typer.Context, overrides: list[str]) -> str | None:
    """The option of this command that a mistyped one, taken for an override, is closest to."""
    known = [name for parameter in context.command.params for name in parameter.opts]
    for token in overrides:
        written = token.partition("=")[0].replace("_", "-")
        if written.startswith("--") and (near := get_close_matches(written, known, n=1)):
            return near[0]
    return None


def _order(
    path: str, data_root: str | None, recipe: TrainRecipe, world_size: int
) -> tuple[Manifest, SampleOrder]:
    from kinema.data.manifest import Manifest
    from kinema.training.estimate import order_of

    clips = Manifest.read(path, data_root=data_root)
    return clips, order_of(recipe, clips, world_size)


def _steps(text: str, count: int) -> range:
    from kinema.config.errors import ConfigError

    first, colon, last = text.partition(":")
    try:
        begin, end = int(first or 0), int(last or count)
    except ValueError:
        colon = ""
        begin = end = 0
    if not colon or not 0 <= begin < min(end, count):
        raise ConfigError(
            f"--steps {text}: the epoch has steps 0:{count}", hint="write A:B with 0 <= A < B"
        )
    return range(begin, min(end, count))


def _clip_size(
    clip: str, manifest: str | None, data_root: str | None
) -> tuple[str, tuple[int, int, int], list[str]]:
    """What to call the clip; frames, height, width; and why it is dropped, line by line."""
    if manifest is None:
        from kinema.media.probe import probe

        info = probe(clip)
        return clip, (info.num_frames, info.height, info.width), []
    from kinema.data.explain import why_dropped
    from kinema.data.manifest import Manifest

    clips = Manifest.read(manifest, data_root=data_root)
    row = _find_row(clips, clip)
    frames, height, width = (
        int(clips.column(name)[row]) for name in ("num_frames", "height", "width")
    )
    dropped = why_dropped(clips.table.slice(row, 1))
    return f"row {row}: {clips.path(row)}", (frames, height, width), dropped


def _find_row(clips: Manifest, clip: str) -> int:
    import pyarrow.compute as pc

    from kinema.config.errors import KinemaError

    file = os.path.abspath(clip)
    below = [] if isinstance(clips.root, str) else [os.path.relpath(file, clips.root)]
    for path in (clip, file, *below):
        row = int(pc.index(clips.table.column("path"), path).as_py())
        if row >= 0:
            return row
    if clip.isdecimal() and int(clip) < len(clips):
        return int(clip)
    raise KinemaError(
        f"no clip {clip!r}: neither a path in it nor a row (0 to {len(clips) - 1})",
        where=clips.source,
        hint="give the path as the manifest has it",
    )
