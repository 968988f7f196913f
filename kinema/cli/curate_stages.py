"""`kinema curate STAGE`: one stage alone, over a manifest or over raw videos."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinema.cli.curate import (
    Copy,
    DataRoot,
    Ray,
    Workers,
    curate_app,
    open_executor,
    print_stages,
    read_recipe,
    split_overrides,
)
from kinema.cli.overrides import FREE

if TYPE_CHECKING:
    from kinema.curation.alone import Alone

STAGES = {
    "probe": "Codec, bit rate, rotation, audio, variable rate, duration.",
    "motion": "Motion vectors, optical flow, camera motion, jitter.",
    "quality": "Sharpness, brightness, borders, repeated frames, blockiness.",
    "hashes": "Perceptual hashes of frames.",
    "aesthetic": "LAION's aesthetic score.",
    "ocr": "Text on screen.",
    "nsfw": "Probability of a class of nsfw.model.",
    "watermark": "Probability of a class of watermark.model.",
    "caption": "Captions by caption.model, here or at caption.endpoint.",
    "match": "How well captions fit the frames.",
    "dedup": "Duplicates (and concepts, with embed={} dedup.concepts=N).",
}
"""Stages that add columns to a manifest."""
SWITCHES = {"dedup": ["dedup", "hashes"], "probe": []}
"""What to switch on in the recipe, where that is not the stage alone (`probe` always runs)."""
NEEDS = {
    "nsfw": ("model", "label"),
    "watermark": ("model", "label"),
    "caption": ("model",),
}
"""Settings without a default."""
SHOWN = 8

Manifest = Annotated[
    list[str],
    typer.Argument(metavar="MANIFEST [KEY=VALUE...]", help="Manifest, and changes to the recipe."),
]
Output = Annotated[str, typer.Option("-o", "--output", help="Manifest to write.")]


@curate_app.command(context_settings=FREE)
def scenes(
    context: typer.Context,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT... [KEY=VALUE...]", help="As of `run`; and changes to the recipe."
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="Cut list to write: .parquet.")],
    data_root: DataRoot = None,
    workers: Workers = os.cpu_count() or 1,
    ray: Ray = None,
) -> None:
    """Find scenes, and write them as a cut list.

    `kinema curate cut` writes its clips.
    """
    given, overrides = split_overrides([*inputs, *context.args])
    run = _alone(output, _switched_on("scenes", overrides), workers, ray)
    count = _finish(run, lambda: run.cuts(given, output, data_root=data_root))
    print(f"{output}: {count:,} clips")


@curate_app.command(context_settings=FREE)
def cut(
    context: typer.Context,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT... [KEY=VALUE...]",
            help="Cut lists or whole videos; and changes to the recipe.",
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder for clips and manifest.")],
    copy: Copy = False,
    data_root: DataRoot = None,
    workers: Workers = os.cpu_count() or 1,
    ray: Ray = None,
) -> None:
    """Write the clips of cut lists, and a manifest of them.

    Nothing is scored.
    """
    from kinema.cli.curate import run

    run(
        context,
        [*inputs, "cut.whole=encode"],
        output,
        recipe="curate/alone",
        copy=copy,
        data_root=data_root,
        workers=workers,
        ray=ray,
        report=False,
    )


def _switched_on(name: str, overrides: list[str]) -> list[str]:
    """Changes to `curate/alone` that switch a stage on, and the person's own."""
    wanted = SWITCHES.get(name, [name])
    named = {word.lstrip("-").partition("=")[0].partition(".")[0] for word in overrides}
    return [*(f"{one}={{}}" for one in wanted if one not in named), *overrides]


def _alone(output: str, overrides: list[str], workers: int, ray: str | None) -> Alone:
    from kinema.curation.alone import Alone

    return Alone(output, read_recipe("curate/alone", overrides), open_executor(workers, ray))


def _finish(run: Alone, work: Any) -> Any:
    try:
        result = work()
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command again continues from here", err=True)
        raise typer.Exit(130) from None
    finally:
        run.close()
    from kinema.curation.files import seen_from_here

    print_stages(run.stats)
    for bad in run.bad[:SHOWN]:
        print(f"  {seen_from_here(bad.path)}: {bad.message} [{bad.stage}: {bad.reason}]")
    if len(run.bad) > SHOWN:
        print(f"  and {len(run.bad) - SHOWN} more")
    return result


def _register_stage(name: str, text: str) -> None:
    def stage(
        context: typer.Context,
        manifest: Manifest,
        output: Output,
        data_root: DataRoot = None,
        workers: Workers = os.cpu_count() or 1,
        ray: Ray = None,
    ) -> None:
        from kinema.config.errors import ConfigError

        given, overrides = split_overrides([*manifest, *context.args])
        missing = [
            f"{name}.{key}=..."
            for key in NEEDS.get(name, ())
            if not any(f"{name}.{key}" in word or f"{name}={{" in word for word in overrides)
        ]
        if missing:
            raise ConfigError(
                "needs a setting that has no default",
                where=f"kinema curate {name}",
                hint=" ".join(missing),
            )
        if len(given) != 1:
            raise ConfigError(
                f"takes one manifest, not {len(given)}",
                where=f"kinema curate {name}",
                hint="`kinema data index FOLDER -o M.parquet` makes one of a folder of clips",
            )
        run = _alone(output, _switched_on(name, overrides), workers, ray)
        found = _finish(run, lambda: run.columns(given[0], output, data_root=data_root))
        print(f"{output}: {int(found.kept.sum()):,} of {len(found):,} clips")

    needed = " and ".join(f"{name}.{key}=..." for key in NEEDS.get(name, ()))
    stage.__doc__ = (
        f"{text}\n\nAdds the columns to a manifest's clips, which stay where they are."
        + (f" Needs {needed}." if needed else "")
    )
    curate_app.command(name=name, context_settings=FREE)(stage)


for _name, _text in STAGES.items():
    _register_stage(_name, _text)
