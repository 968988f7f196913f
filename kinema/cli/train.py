"""`kinema train` and `kinema train-vae`: the same loop with another task."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kinema.cli.find_batch_size import find_and_print, refuse_alone
from kinema.cli.overrides import FREE

STOPPING = (
    "Ctrl-C or SIGTERM finishes the step, writes a checkpoint and exits with 0; a second Ctrl-C "
    "leaves at once."
)


def register(app: typer.Typer) -> None:
    app.command(
        "train",
        context_settings=FREE,
        help=f"Train a text-to-video model, alone or as one of torchrun's processes. {STOPPING}",
    )(_command("text-to-video"))
    app.command(
        "train-vae",
        context_settings=FREE,
        help=f"Train the autoencoder that `kinema train` looks through. {STOPPING}",
    )(_command("vae"))


def _command(task: str) -> Callable[..., None]:
    def command(
        recipe: Annotated[
            str | None,
            typer.Argument(
                metavar="RECIPE",
                help="Name (tiny/world) or file; may be left out with --load.",
            ),
        ] = None,
        overrides: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="KEY=VALUE",
                help="Changes to the recipe: optim.lr=3e-4, or --data.num_workers 2.",
            ),
        ] = None,
        data_path: Annotated[
            str | None, typer.Option(help="Manifest of the clips: .csv or .parquet.")
        ] = None,
        data_root: Annotated[
            str | None, typer.Option(help="Folder that the manifest's paths are relative to.")
        ] = None,
        ckpt_path: Annotated[
            Path | None,
            typer.Option(help="Start from these weights alone (checkpoint, run or file)."),
        ] = None,
        load: Annotated[
            Path | None,
            typer.Option(help="Go on with this run (folder or checkpoint), in its folder."),
        ] = None,
        start_from_scratch: Annotated[
            bool,
            typer.Option(
                "--start-from-scratch",
                help="With --load: all but the data position, in a new run folder.",
            ),
        ] = False,
        go_on: Annotated[
            bool,
            typer.Option(
                "--continue",
                help="Go on with the newest run of this recipe in the outputs folder, if there is "
                "one; for jobs that a cluster starts again.",
            ),
        ] = False,
        allow_new: Annotated[
            list[str] | None,
            typer.Option(help="With --ckpt-path: tensors (regular expression) it may lack."),
        ] = None,
        allow_unexpected: Annotated[
            list[str] | None,
            typer.Option(help="With --ckpt-path: tensors in it that the model may lack."),
        ] = None,
        outputs: Annotated[
            str | None, typer.Option(help="Folder that the run folder is made in.")
        ] = None,
        device: Annotated[
            str | None, typer.Option(help="cpu or cuda; a GPU where there is one by default.")
        ] = None,
        wandb: Annotated[
            bool,
            typer.Option(
                "--wandb",
                help="Record to Weights & Biases too; --tracking.wandb.project NAME says where.",
            ),
        ] = False,
        profile: Annotated[
            bool,
            typer.Option(
                "--profile",
                help="Record some steps, say where their time goes and what to try next, and end.",
            ),
        ] = False,
        profile_steps: Annotated[
            int | None,
            typer.Option(min=1, help="With --profile: steps to record.", show_default="5"),
        ] = None,
        find_batch_size: Annotated[
            bool,
            typer.Option(
                "--find-batch-size",
                help="Do not train: find the largest batch of every bucket that fits here.",
            ),
        ] = False,
        memory_fraction: Annotated[
            float | None,
            typer.Option(
                min=0.05,
                max=1.0,
                help="With it: share of the device's memory to fill.",
                show_default="0.9",
            ),
        ] = None,
        memory_limit: Annotated[
            str | None,
            typer.Option(help="With it: memory of the device, such as 16GB; needed on a CPU."),
        ] = None,
        for_gpus: Annotated[
            int | None,
            typer.Option(
                min=1,
                help="With it: GPUs of the run to come, which share what the recipe shards.",
                show_default="1",
            ),
        ] = None,
    ) -> None:
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its older name, which still works
            # Before PyTorch is there. Buckets of many sizes would leave holes in a GPU's memory.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        from kinema.checkpoint.errors import CheckpointError
        from kinema.cli.this_machine import refuse_url
        from kinema.config.errors import ConfigError
        from kinema.telemetry.config import WandbConfig
        from kinema.training.guard import GuardError
        from kinema.training.nonfinite import NonFiniteError
        from kinema.training.preflight import RanksDifferError
        from kinema.training.profile import check_length
        from kinema.training.restart import Launch
        from kinema.training.run import train
        from kinema.training.start import Start, read_recipe

        start = Start(
            ckpt_path=ckpt_path,
            load=load,
            from_scratch=start_from_scratch,
            go_on=go_on,
            allow_new=tuple(allow_new or ()),
            allow_unexpected=tuple(allow_unexpected or ()),
        )
        name, changes = split(recipe, overrides or [])
        changes = changes_of(changes, data_path, data_root, outputs)
        checked = read_recipe(name, changes, start)
        refuse_url(checked.outputs, "outputs", hint="write here; copy checkpoints to the store")
        if checked.task.type != task:
            other = "train-vae" if task == "text-to-video" else "train"
            raise ConfigError(
                f"this recipe's task is {checked.task.type!r}",
                where=name,
                hint=f"kinema {other} {name or ''}",
            )
        if wandb and checked.tracking.wandb is None:
            tracking = replace(checked.tracking, wandb=WandbConfig())
            checked = replace(checked, tracking=tracking)
        if find_batch_size and (profile or profile_steps is not None):
            raise ConfigError(
                "--find-batch-size does not train: there is nothing to profile",
                hint="leave one of the two out",
            )
        if find_batch_size:
            find_and_print(
                checked,
                device=device,
                fraction=memory_fraction,
                limit=memory_limit,
                ranks=for_gpus,
            )
            return
        refuse_alone(
            "--find-batch-size",
            memory_fraction=memory_fraction,
            memory_limit=memory_limit,
            for_gpus=for_gpus,
        )
        if profile:
            profile_steps = 5 if profile_steps is None else profile_steps
            check_length(checked, profile_steps)
        else:
            refuse_alone("--profile", profile_steps=profile_steps)
        main = os.environ.get("RANK", "0") == "0"
        try:
            with Launch(checked.outputs).final_errors():
                result = train(checked, start, device=device, profile_steps=profile_steps)
        except (NonFiniteError, CheckpointError, GuardError, RanksDifferError) as error:
            if main:
                raise
            raise SystemExit(error.exit_code) from None  # rank 0 says the same
        if main:
            print(result.run)

    return command


def split(recipe: str | None, overrides: list[str]) -> tuple[str | None, list[str]]:
    """Without a recipe, the first override stands in its place."""
    if recipe is not None and (recipe.startswith("--") or "=" in recipe):
        return None, [recipe, *overrides]
    return recipe, list(overrides)


def changes_of(
    overrides: list[str], data_path: str | None, data_root: str | None, outputs: str | None
) -> list[str]:
    """Changes to the recipe: those written out, then those that have options of their own."""
    given = {"data.path": data_path, "data.root": data_root, "outputs": outputs}
    named = [f"{key}={_quoted(text)}" for key, text in given.items() if text is not None]
    return [*overrides, *named]


def _quoted(text: str) -> str:
    """As YAML reads it back, whatever it looks like: a path may be `12`."""
    return "'" + text.replace("'", "''") + "'"
