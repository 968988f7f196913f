"""`kinema curate`: raw videos to clips with captions, scores and a manifest."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from kinema.cli.overrides import FREE

if TYPE_CHECKING:
    from kinema.curation.config import CurateRecipe
    from kinema.curation.engine import StageStats
    from kinema.curation.executor import Executor
    from kinema.curation.pipeline import Outcome
    from kinema.curation.report import StageSummary

_OVERRIDE = re.compile(r"(--)?[A-Za-z_][\w.]*=")
SHOWN = 8
"""Refused files to name on the screen; refused.jsonl has all."""
RULE_WIDTH = 46
"""Characters of a rule in the table of rules; a longer one moves its figures to the right."""


class _RunByDefault(TyperGroup):
    """`kinema curate VIDEOS -o OUT` is `kinema curate run VIDEOS -o OUT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See `click.Group`."""
        first = next((arg for arg in args if not arg.startswith("-")), None)
        if args and first not in self.commands and args[0] not in ctx.help_option_names:
            _refuse_unknown(args[0], list(self.commands))
            args = ["run", *args]
        return super().parse_args(ctx, args)


def _refuse_unknown(word: str, stages: list[str]) -> None:
    """A first word that is neither a stage nor there: a slip, and which option `run` misses is not
    what its writer wants to know."""
    if not re.fullmatch(r"[\w-]*\w[\w-]*", word) or word.startswith("-") or Path(word).exists():
        return
    from difflib import get_close_matches

    from kinema.config.errors import ConfigError

    near = get_close_matches(word, stages, n=1)
    raise ConfigError(
        "there is neither a file or folder nor a stage of this name",
        where=word,
        hint=f"did you mean `kinema curate {near[0]}`?"
        if near
        else "kinema curate VIDEOS -o OUT; `kinema curate --help` lists the stages",
    )


curate_app = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    short_help="Raw videos to clips, scores, captions, a manifest.",
    help="Raw videos to clips, scores, captions and a manifest: kinema curate VIDEOS -o OUT. "
    "`kinema curate run -h` has its options; the other commands do one stage alone.",
)

RecipeName = Annotated[
    str, typer.Option("--recipe", help="Recipe of curation: a name (curate/...) or a file.")
]
Workers = Annotated[
    int, typer.Option(min=1, show_default="all cores", help="Processes for CPU stages.")
]
Ray = Annotated[
    str | None,
    typer.Option(help="Run on a Ray cluster: its address (HOST:PORT, auto), or local."),
]
Copy = Annotated[
    bool, typer.Option("--copy", help="Copy packets instead of encoding: keeps long GOPs.")
]
DataRoot = Annotated[
    str | None,
    typer.Option(help="Folder that paths in lists and tables are below (default: their own)."),
]


def register(app: typer.Typer) -> None:
    from kinema.cli import curate_stages  # its commands join `curate_app`

    assert curate_stages
    app.add_typer(curate_app, name="curate")


@curate_app.command(context_settings=FREE)
def run(
    context: typer.Context,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT... [KEY=VALUE...]",
            help="Folders, videos, lists (.txt), tables (.csv, .parquet), URLs of stores; and "
            "changes to the recipe.",
        ),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="Folder (or URL) for clips and manifest.")
    ],
    recipe: RecipeName = "curate/default",
    copy: Copy = False,
    captions: Annotated[
        str | None,
        typer.Option(help="Table of captions of whole videos. Default: .txt files beside them."),
    ] = None,
    data_root: DataRoot = None,
    workers: Workers = os.cpu_count() or 1,
    ray: Ray = None,
    report: Annotated[bool, typer.Option(help="Write OUT/report.html at the end.")] = True,
) -> None:
    """The whole of it: raw videos to clips, scores and a manifest.

    `kinema curate VIDEOS -o OUT` is this command. What is done is in the recipe: find scenes, cut,
    score, compare, caption, filter. The same command goes on where it was stopped. With other
    rules or further stages only what is missing is worked out.
    """
    from kinema.curation.pipeline import curate

    output = output.rstrip("/") or "/"
    given, overrides = split_overrides([*inputs, *context.args])
    found = read_recipe(recipe, [*overrides, "cut.mode=copy"] if copy else overrides)
    executor = open_executor(workers, ray)
    try:
        outcome = curate(
            given,
            output,
            found,
            executor=executor,
            recipe_name=recipe,
            captions=captions,
            data_root=data_root,
            say=_note,
        )
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command again continues from here", err=True)
        raise typer.Exit(130) from None
    finally:
        executor.close()
    if report:
        from kinema.curation.report import write_report

        write_report(output)
    _print(outcome, output, report)
    if outcome.stopped is not None:
        raise outcome.stopped
    if outcome.kept == 0:
        hint = "other rules; the table above says how many each drops"
        typer.echo(f"error: the rules drop every clip\n  try: {hint}", err=True)
        raise typer.Exit(1)


@curate_app.command(name="report")
def report_(
    output: Annotated[str, typer.Argument(metavar="OUT", help="Folder of a curation run.")],
    seed: Annotated[int, typer.Option(help="Of the random samples.")] = 0,
) -> None:
    """Write OUT/report.html anew.

    The funnel, scores, samples, captions, times and costs of a run.
    """
    from kinema.curation.report import write_report

    print(write_report(output, seed=seed))


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Inputs and changes to the recipe, which may stand in any order."""
    given, overrides = [], []
    words = list(words)
    while words:
        word = words.pop(0)
        if word.startswith("="):
            raise _slip(word, "a change to the recipe is one word, without spaces: KEY=VALUE")
        if word.startswith("--"):
            _refuse_option(word)
            overrides.append(word)
            if "=" not in word and words:
                overrides.append(words.pop(0))
        elif _OVERRIDE.match(word) and not Path(word).exists():
            overrides.append(word)
        else:
            given.append(word)
    return given, overrides


def _refuse_option(word: str) -> None:
    """An option that no command has and that is no key of the recipe either."""
    from dataclasses import fields
    from difflib import get_close_matches

    from kinema.curation.config import CurateRecipe

    name = word.partition("=")[0]
    if "." in name or name[2:] in {field.name for field in fields(CurateRecipe)}:
        return
    options = ("--output", "--recipe", "--captions", "--data-root", "--workers", "--ray", "--copy",
               "--report", "--no-report")  # fmt: skip
    near = get_close_matches(name, options, n=1)
    raise _slip(name, f"did you mean {near[0]}?" if near else "-h lists the options")


def _slip(word: str, hint: str) -> Exception:
    from kinema.config.errors import ConfigError

    return ConfigError(f"{word!r} is no option and no KEY=VALUE", where="command line", hint=hint)


def read_recipe(name: str, overrides: list[str]) -> CurateRecipe:
    """A recipe of curation with changes.

    Args:
        name: of one that comes with the package, with or without `curate/`, or a file.
    """
    from difflib import get_close_matches

    from kinema.config.errors import ConfigError
    from kinema.config.recipe import load_recipe, recipe_names
    from kinema.curation.config import CurateRecipe

    known = [known for known in recipe_names() if known.startswith("curate/")]
    if not name.endswith((".yaml", ".yml")):
        full = name if name.startswith("curate/") else f"curate/{name}"
        if full not in known:
            near = get_close_matches(full, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"no recipe of curation {name!r}: neither a .yaml file nor a name",
                where="--recipe",
                hint=f"{hint}named ones: {', '.join(known)}",
            )
        name = full
    return load_recipe(name, CurateRecipe, overrides)


def open_executor(workers: int, ray: str | None) -> Executor:
    """What runs the stages."""
    if ray is not None:
        from kinema.curation.ray_cluster import RayExecutor

        return RayExecutor(ray)
    from kinema.curation.local import LocalExecutor

    return LocalExecutor(workers)


def _note(line: str) -> None:
    typer.echo(line, err=True)


def _print(outcome: Outcome, output: str, report: bool) -> None:
    from kinema.telemetry.progress import format_duration

    print_stages(outcome.summary.stages)
    if outcome.refused:
        print_refused(outcome.refused)
    print_rules(outcome)
    hours = format_duration(outcome.hours * 3600)
    print(
        f"{output}/manifest.parquet: {outcome.kept:,} of {outcome.clips:,} clips kept "
        f"({hours} of video), from {outcome.readable:,} of {outcome.sources:,} videos"
    )
    if report:
        print(f"{output}/report.html")
    if outcome.kept and not outcome.captioned:
        print("no clip has a caption yet, and training needs them: the same command with "
              "caption.model=MODEL")  # fmt: skip


def print_stages(stages: Sequence[StageStats | StageSummary]) -> None:
    """A table: what each stage did and how fast."""
    head = ("rows", "known", "bad", "rows/core s", "video h/core h")
    print(f"{'stage':<20}{head[0]:>11}{head[1]:>11}{head[2]:>8}{head[3]:>13}{head[4]:>16}")
    for stage in stages:
        work_s = stage.worker_s
        rate = _figure(stage.computed / work_s) if work_s else "-"
        speed = _figure(stage.video_hours * 3600 / work_s) if work_s and stage.video_hours else "-"
        print(
            f"{stage.name:<20}{stage.computed:>11,}{stage.recalled:>11,}{stage.bad:>8,}"
            f"{rate:>13}{speed:>16}"
        )


def _figure(value: float) -> str:
    """Three digits, and no exponent where there are more."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def print_refused(refused: list[dict[str, str]]) -> None:
    """The first of what gave nothing, and how many for each reason."""
    from collections import Counter

    from kinema.curation.files import seen_from_here

    counts = Counter(item["reason"] for item in refused)
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    print(f"left out: {len(refused)} ({reasons})")
    for item in refused[:SHOWN]:
        print(f"  {seen_from_here(item['path'])}: {item['message']}")
    if len(refused) > SHOWN:
        print(f"  and {len(refused) - SHOWN} more, in refused.jsonl")


def print_rules(outcome: Outcome) -> None:
    """What each rule dropped, most of it perhaps before it was cut."""
    from kinema.curation.pipeline import NOT_CUT

    others = dict(outcome.verdict.others)
    counts = outcome.verdict.counts
    broad = max((len(count.rule.text) for count in counts), default=0)
    broad = min(max(broad, len("rule")), RULE_WIDTH)
    if counts:
        print(f"\n{'rule':<{broad}}{'drops':>11}{'alone':>11}{'not cut':>11}")
    for count in counts:
        uncut = others.pop(f"{NOT_CUT}{count.rule.text}", 0)
        figures = (count.first + uncut, count.alone, uncut)
        print(f"{count.rule.text:<{broad}}" + "".join(f"{figure:>11,}" for figure in figures))
    for reason, rows in others.items():
        print(f"dropped {rows:,}: {reason}")
    print()
