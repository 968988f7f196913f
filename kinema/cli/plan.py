"""`kinema plan`: what a run will take, before any GPU is asked for."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinema.cli.data import DataRoot
from kinema.cli.data_order import Overrides, Recipe, read_recipe
from kinema.cli.overrides import FREE

if TYPE_CHECKING:
    from kinema.training.config import TrainRecipe
    from kinema.training.estimate import Cluster, Estimate
    from kinema.training.fit import LengthFit, RecomputeFit


def register(app: typer.Typer) -> None:
    app.command("plan", context_settings=FREE)(plan)


def plan(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the run, one rank each.")] = 8,
    gpu: Annotated[str, typer.Option(help="Their kind: h100, a100-80, ... (wrong: lists all).")] = (
        "h100"
    ),
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one machine.")] = 8,
    manifest: Annotated[
        str | None, typer.Option(help="Clips to plan for: .csv or .parquet.")
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(help="In place of a manifest, clips generated like openvid[+miradata]."),
    ] = None,
    scale: Annotated[
        float, typer.Option(min=1e-6, help="With --like: how many times as many clips.")
    ] = 1.0,
    efficiency: Annotated[
        float | None,
        typer.Option(min=1e-3, max=1.0, help="Share of the GPUs' peak; default: as published."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data, in place of the recipe's.")
    ] = None,
    network: Annotated[
        float, typer.Option(min=0.1, help="Gbit/s per GPU to other machines.")
    ] = 400.0,
    suggest: Annotated[
        bool, typer.Option("--suggest/--no-suggest", help="Look for what would fit better.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data_root: DataRoot = None,
) -> None:
    """Say what a run takes: memory by bucket, steps, days, GPU hours; and what would fit better.

    Nothing runs and no GPU is needed. Fails when a bucket that has clips does not fit.
    """
    from dataclasses import asdict

    from kinema.config.errors import ConfigError
    from kinema.data.like import manifest_like
    from kinema.data.manifest import Manifest
    from kinema.parallel.config import check_groups, check_sharing
    from kinema.training import estimate as numbers
    from kinema.training import fit as fitting
    from kinema.training.gpus import find_gpu
    from kinema.training.memory import predict

    if (manifest is None) == (like is None):
        raise ConfigError(
            "needs the clips to plan for: one of --manifest and --like",
            hint="--manifest clips.parquet, or --like openvid for clips that do not exist",
        )
    if like is None and scale != 1.0:
        raise ConfigError("--scale goes with --like")
    cluster = numbers.Cluster(find_gpu(gpu), gpus, gpus_per_node, network * 1e9 / 8)
    settings = read_recipe(context, recipe, overrides)
    local = min(gpus_per_node, gpus)
    over = settings.parallel.shard_over
    check_sharing(settings.parallel.sequence, gpus)
    if over != "all":
        check_groups(local if over == "node" else min(over, gpus), gpus)
    if manifest is not None:
        clips = Manifest.read(manifest, data_root=data_root)
    else:
        assert like is not None
        clips = manifest_like(like, scale)
    order = numbers.order_of(settings, clips, gpus)
    share = numbers.EFFICIENCY if efficiency is None else efficiency
    found = numbers.estimate(settings, clips, order, cluster, efficiency=share, epochs=epochs)
    memory = predict(settings, world_size=gpus, local_size=local)
    lengths = fitting.fit(settings, order, memory, cluster.gpu.memory)
    better = None
    choices: list[RecomputeFit] = []
    if suggest:
        batches = fitting.equal_batches(lengths)
        changed = fitting.with_batches(settings, batches)
        other = numbers.order_of(changed, clips, gpus)
        better = (
            changed,
            numbers.estimate(changed, clips, other, cluster, efficiency=share, epochs=epochs),
        )
        choices = fitting.recompute_choices(
            settings, order, lengths, cluster.gpu.memory, world_size=gpus, local_size=local
        )
    sharing = {
        str(item.bucket): fitting.sharing_that_fits(item, memory, cluster.gpu.memory)
        for item in lengths
        if not item.most
    }
    if as_json:
        print(
            json.dumps(
                {
                    **_numbers(found),
                    "plan": found.plan.to_dict(),
                    "gpu": asdict(cluster.gpu),
                    "gpus": gpus,
                    "fixed_bytes": asdict(memory.fixed),
                    "lengths": [
                        {
                            **asdict(item),
                            "fits": item.fits,
                            "seconds": _seconds(item, cluster, share),
                        }
                        for item in lengths
                    ],
                    "sharing": sharing,
                    "recompute": [asdict(choice) for choice in choices],
                    "suggested": better
                    and {**_numbers(better[1]), "yaml": fitting.as_yaml(better[0])},
                }
            )
        )
    else:
        source = str(manifest) if manifest else f"clips like {like}"
        _say(_heading(settings, source, cluster, share, given=efficiency is not None))
        print(f"\n{_table(lengths, cluster, share)}\n")
        always = f"of {_gib(cluster.gpu.memory)} on each GPU, always there: "
        _say([always + memory.fixed.describe(), *_totals(found, cluster, settings), ""])
        _say(_advice(found, lengths, choices, better, sharing, settings))
        if better is not None:
            print(fitting.as_yaml(better[0]))
    if not all(item.fits for item in lengths):
        raise typer.Exit(1)


def _numbers(found: Estimate) -> dict[str, Any]:
    from dataclasses import asdict

    result = {k: v for k, v in asdict(found).items() if k != "plan"}
    result |= {"steps_per_epoch": found.plan.steps_per_epoch}
    result |= {"step_balance": found.plan.step_balance}
    return result | {"gpu_hours": found.gpu_hours, "days": found.days}


def _heading(
    recipe: TrainRecipe, source: str, cluster: Cluster, efficiency: float, *, given: bool
) -> list[str]:
    from kinema.data.plan import counted

    gpu, machines = cluster.gpu, counted(cluster.nodes, "machine")
    why = "" if given else ", what Open-Sora 1.1 and 1.2 were published with"
    return [
        f"{recipe.name} on {source}: {cluster.gpus} x {gpu.name}, {machines}, "
        f"{_gib(gpu.memory)} and {gpu.peak / 1e12:.0f} TFLOP/s each ({gpu.source})",
        f"efficiency {efficiency:.0%} of that peak, all work counted{why}",
    ]


def _say(lines: list[str]) -> None:
    """Print lines, wrapped where they are longer than the terminal (or 100) is wide."""
    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    for line in lines:
        print(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False))


def _seconds(item: LengthFit, cluster: Cluster, efficiency: float) -> float:
    return item.batch * item.cost / (efficiency * cluster.gpu.peak)


def _table(lengths: list[LengthFit], cluster: Cluster, efficiency: float) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bucket")
    for name in ("largest", "of at most", "ranks", "memory", "fits", "seconds", "work"):
        table.add_column(name, justify="right")
    whole = sum(item.work for item in lengths)
    for item in lengths:
        b = item.bucket
        length = "image" if b.frames == 1 else f"{b.frames} frames"
        table.add_row(
            f"{b.resolution} {length}",
            f"{b.width}x{b.height}",
            str(item.batch),
            str(item.degree),
            _gib(item.needed) + ("*" if item.encodes else ""),
            f"{item.most}" if item.fits else f"NO, {item.most}",
            _tenths(_seconds(item, cluster, efficiency)),
            f"{item.work / whole:.1%}",
        )
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _totals(found: Estimate, cluster: Cluster, recipe: TrainRecipe) -> list[str]:
    from kinema.data.plan import counted
    from kinema.generation.memory import in_words

    plan, sent = found.plan, found.communication
    lines = [
        f"{plan.samples:,} of {plan.rows:,} clips an epoch, "
        f"{counted(plan.steps_per_epoch, 'step')} of {_tenths(found.step_seconds)} s, "
        f"balance {plan.step_balance:.3f} "
        f"(by the originals' rule, tails dropped: {found.published_steps:,} steps)",
        f"an epoch {_hours(found.epoch_gpu_hours)}; all {found.steps:,} steps "
        f"({_end(found, recipe)}): {_hours(found.gpu_hours)}, "
        f"{_tenths(found.days)} days",
    ]
    if found.step_seconds < 0.01:
        lines.append("so small a model waits for its kernels to start: it is slower than this says")
    lines += [f"note: {note}" for note in plan.notes]
    if sent.seconds:
        lines.append(
            f"each rank sends {in_words(int(sent.weights_bytes + sent.sequence_bytes))} a step, "
            f"{sent.seconds:.2f} s at the links' full rate "
            f"({sent.seconds / found.step_seconds:.0%} of a step where nothing hides it)"
        )
    if found.decoded_per_s:
        lines.append(
            f"loader: {found.decoded_per_s:.1f} clips/s in all, about {found.decode_cores:.1f} "
            "cores a machine at 35 million source pixels/s each"
        )
    lines.append(
        f"a checkpoint has {_decimal(found.checkpoint_bytes)}, one every {recipe.ckpt_every} "
        f"steps ({_tenths(recipe.ckpt_every * found.step_seconds / 60)} minutes)"
    )
    return lines


def _end(found: Estimate, recipe: TrainRecipe) -> str:
    """What ends the run."""
    whole = found.epochs * found.plan.steps_per_epoch
    if found.steps < whole:
        return f"max_steps, {found.steps / found.plan.steps_per_epoch:.1f} epochs"
    open_ended = " as the recipe has it; --epochs N for fewer" if found.epochs >= 100 else ""
    return f"{found.epochs:,} epochs{open_ended}"


def _advice(
    found: Estimate,
    lengths: list[LengthFit],
    choices: list[RecomputeFit],
    better: tuple[TrainRecipe, Estimate] | None,
    sharing: dict[str, int | None],
    recipe: TrainRecipe,
) -> list[str]:
    from kinema.data.plan import counted

    lines = []
    for item in lengths:
        if not item.fits:
            lines.append(f"does not fit: {item.bucket}, {item.batch} clips; {item.most} would")
    if any(item.encodes for item in lengths):
        lines.append("* while the autoencoder encodes: a smaller vae.micro_batch_size takes less")
    for name, degree in sharing.items():
        cure = f"parallel.sequence={degree} would" if degree else "nor with 8 ranks to a clip"
        lines.append(f"not one clip of {name} fits: {cure}")
    for choice in choices:
        own = " (the recipe's)" if choice.kind == recipe.recompute else ""
        fits = "fits" if choice.fits else "does not fit"
        lines.append(
            f"recompute {choice.kind}{own}: {fits}, at most {_gib(choice.needed)}, "
            f"{choice.flops - 1:+.0%} work"
        )
    for saved, what in (
        (found.cached_latents, "a latent cache (kinema latents encode)"),
        (found.cached_text, "a text cache (kinema text encode)"),
    ):
        if saved:
            lines.append(
                f"{what} saves {saved / found.epoch_gpu_hours:.0%}, {_hours(saved)} an epoch"
            )
    if better is not None:
        after = better[1]
        lines.append(
            f"batch sizes of equal steps that fit: {counted(after.plan.steps_per_epoch, 'step')} "
            f"of {_tenths(after.step_seconds)} s, balance {after.plan.step_balance:.3f}, "
            f"{_hours(after.epoch_gpu_hours)} an epoch at the same efficiency"
        )
    return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _hours(hours: float) -> str:
    if hours < 0.01:
        return "under 0.01 GPU hours"
    return f"{hours:,.0f} GPU hours" if hours >= 10 else f"{hours:.2g} GPU hours"


def _tenths(value: float) -> str:
    return f"{value:,.1f}" if value >= 0.05 else "under 0.1"


def _decimal(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
