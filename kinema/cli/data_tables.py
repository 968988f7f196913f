"""`kinema data filter`, `merge`, `split` and `stats`: what is done with whole tables of clips."""

from __future__ import annotations

from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated

import typer

from kinema.cli.data import DataRoot, ManifestPath, data_app

Output = Annotated[str, typer.Option("-o", "--output", help="Manifest to write: .csv or .parquet.")]


@data_app.command("filter")
def filter_command(
    manifest: Annotated[
        str | None, typer.Argument(metavar="MANIFEST", help=".csv or .parquet", show_default=False)
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RULE",
            help="What kept clips fulfil: 'aesthetic >= 4.5', 'file_size <= 50MB'.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="Manifest to write. Default: only count."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="Published rules, before the others; may be given several times."),
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="List presets and ready rules, and leave.")
    ] = False,
    what_if: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Say what thresholds of this column would keep."),
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Thresholds for --what-if.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Write kept clips only, instead of marking the rest.")
    ] = False,
    skip_missing: Annotated[
        bool,
        typer.Option("--skip-missing", help="Leave out rules whose columns are not there."),
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Drop clips by rules over columns, and say what each rule drops.

    Rows that break a rule get `dropped_by` = `filter: RULE`, with the first rule that they break.
    What an earlier filter dropped is decided anew; what something else dropped stays dropped.
    """
    from kinema.config.errors import ConfigError
    from kinema.data.filter_file import (
        chosen_rules,
        filter_file,
        render_result,
        render_what_if,
        what_if_file,
    )
    from kinema.data.filter_presets import preset as preset_of
    from kinema.data.filter_presets import render_presets
    from kinema.data.table_file import TableFile, check_place

    if presets:
        print(render_presets(), end="")
        return
    if manifest is None:
        raise ConfigError("no manifest is given", hint="kinema data filter MANIFEST RULE...")
    if output:
        check_place(output)
    table = TableFile(manifest, data_root=data_root)
    published = [rule for name in preset or [] for rule in preset_of(name).parsed()]
    chosen, left_out = chosen_rules(table, rules or [], published, skip=skip_missing)
    for rule, missing in left_out:
        print(f"left out, there is no column {', '.join(missing)}: {rule.text}")
    if not chosen and not what_if and not output:
        raise ConfigError(
            "no rule is given",
            hint=f"kinema data filter {manifest} 'aesthetic >= 4.5'; --presets lists ready ones",
        )
    for column in what_if or []:
        found = what_if_file(table, column, chosen, _numbers(at))
        print(render_what_if(found), end="")
    if chosen or output:
        result = filter_file(table, chosen, output, remove=remove)
        print(render_result(result), end="")
    if output:
        print(f"{output}: written" + ("" if remove else ", dropped clips have `dropped_by`"))


def _numbers(text: str | None) -> list[float] | None:
    from kinema.config.errors import ConfigError

    if text is None:
        return None
    try:
        return sorted(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--at {text}: not numbers", hint="--at 4.5,5,5.5") from None


@data_app.command()
def merge(
    tables: Annotated[
        list[str], typer.Argument(metavar="A B...", help=".csv or .parquet", show_default=False)
    ],
    output: Output,
    on: Annotated[
        str, typer.Option(metavar="COLUMN", help="Which rows are the same clip.")
    ] = "path",
    left: Annotated[
        bool, typer.Option("--left", help="Only clips of A; the others add columns.")
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Merge manifests: rows of clips that only one has, columns of clips that several have.

    Where values differ, the first table's stays, and the difference is shown.
    """
    from kinema.config.errors import ConfigError
    from kinema.data.merge import merge_files
    from kinema.data.plan import counted
    from kinema.data.table_file import TableFile, check_place

    if len(tables) < 2:
        raise ConfigError("there is nothing to merge", hint="kinema data merge A B -o OUT")
    check_place(output)
    files = [TableFile(place, data_root=data_root) for place in tables]
    result = merge_files(files, output, on=on, left=left)
    for table in files:
        name = table.place
        words = [f"{counted(result.added[name], 'clip')} of its own"]
        for count, thing, what in (
            (result.joined[name], "clip", "that a table before it has"),
            (result.left_out[name], "clip", "left out (--left)"),
            (result.repeated[name], "row", "left out, of clips that it has twice"),
        ):
            words += [f"{counted(count, thing)} {what}"] if count else []
        print(f"{name}: {', '.join(words)}")
    for conflict in result.conflicts:
        has = "has" if conflict.clips == 1 else "have"
        print(
            f"{conflict.column}: {counted(conflict.clips, 'clip')} {has} another value, "
            f"{conflict.example}"
        )
    print(f"{output}: {result.rows:,} clips, columns {', '.join(result.columns)}")


@data_app.command()
def split(
    manifest: ManifestPath,
    output: Annotated[str, typer.Option("-o", "--output", help="Manifest of training clips.")],
    validation: Annotated[str, typer.Option(help="Manifest of validation clips.")],
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of the source videos, for validation.")
    ] = 0.02,
    by: Annotated[
        str, typer.Option(metavar="COLUMN", help="Which video a clip is from.")
    ] = "source",
    seed: Annotated[int, typer.Option(help="Another number gives another split.")] = 0,
    data_root: DataRoot = None,
) -> None:
    """Split into training and validation by source video, so that no video is in both.

    A video's side depends on its name and the seed alone: it stays there when the set grows.
    """
    from kinema.config.errors import ConfigError
    from kinema.data.split import split_file
    from kinema.data.table_file import TableFile, check_place

    if check_place(output) and check_place(validation) and output == validation:
        raise ConfigError("--output and --validation are the same file")
    table = TableFile(manifest, data_root=data_root)
    result = split_file(table, output, validation, share, by=by, seed=seed)
    if result.without_source:
        print(f"{result.without_source:,} clips have no {by!r}: each counts as a video of its own")
    for place, side in ((output, result.train), (validation, result.validation)):
        clips = side.clips / table.rows
        print(
            f"{place}: {side.clips:,} clips ({clips:.1%}) of {side.sources:,} videos, "
            f"{side.seconds / 3600:,.1f} hours"
        )


@data_app.command()
def stats(
    manifest: ManifestPath,
    columns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COLUMN",
            help="Columns, or expressions over them. Default: all, and captions.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it: .svg, .html or .png.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="EXPRESSION", help="Clips to look at. Default: all but dropped ones."),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Print what is in a manifest: hours, sizes, how scores are spread, what captions say."""
    from kinema.data.stats import stats_of
    from kinema.data.stats_plot import check_plot, write_plot
    from kinema.data.stats_text import render_stats
    from kinema.data.table_file import TableFile

    if plot is not None:
        check_plot(plot)
    table = TableFile(manifest, data_root=data_root)
    found = stats_of(table, columns or [], where=where)
    width = get_terminal_size(fallback=(110, 24)).columns
    text = render_stats(found, title=manifest, all_bars=bool(columns), width=max(80, width))
    print(text, end="")
    if plot is not None:
        write_plot(found, plot, title=Path(manifest).name)
        print(f"{plot}: written")
