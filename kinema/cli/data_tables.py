"""`kinema data filter`, `merge`, `split` and `stats`: what is done with whole tables of clips."""

from __future__ import annotations

from typing import Annotated

import typer

from kinema.cli.data import DataRoot, data_app

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
