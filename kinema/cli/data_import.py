"""`kinema data import`: from a data set as it was published to a manifest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kinema.cli.data import SHOWN, DataRoot, Workers, data_app
from kinema.cli.grouped_help import GroupedCommand

if TYPE_CHECKING:
    from kinema.curation.importers.run import ImportReport

FILES, CHOICES = "Files", "What to take"


@data_app.command(name="import", cls=GroupedCommand)
def import_(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Data set or layout; --list shows all.", show_default=False
        ),
    ] = None,
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SOURCE...",
            help="Tables, archives or folders, as downloaded.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Manifest to write: .parquet or .csv. A list of parts of long videos: .parquet.",
            rich_help_panel=FILES,
        ),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(
            help="Folder that the videos are below. Default: SOURCE, or the folder it lies in.",
            rich_help_panel=FILES,
        ),
    ] = None,
    extract: Annotated[
        Path | None,
        typer.Option(help="Folder that videos in archives go to.", rich_help_panel=FILES),
    ] = None,
    data_root: DataRoot = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="What was left out and why. Default: OUTPUT.report.jsonl.", rich_help_panel=FILES
        ),
    ] = None,
    encoding: Annotated[
        str, typer.Option(help="Of text in tables.", rich_help_panel=FILES)
    ] = "utf-8",
    text_column: Annotated[
        str | None,
        typer.Option(help="Column with captions, if not the usual.", rich_help_panel=CHOICES),
    ] = None,
    path_column: Annotated[
        str | None,
        typer.Option(help="Column with files (csv, hugging-face).", rich_help_panel=CHOICES),
    ] = None,
    prefer: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="clips|cuts",
            help="Clips cut already, or parts of whole videos. Default: what more rows have.",
            rich_help_panel=CHOICES,
        ),
    ] = None,
    trust_table: Annotated[
        bool,
        typer.Option(
            "--trust-table",
            help="Take frames, size and rate from the table; open no file.",
            rich_help_panel=CHOICES,
        ),
    ] = False,
    workers: Workers = os.cpu_count() or 1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one file.")] = 20.0,
    show_list: Annotated[
        bool, typer.Option("--list", help="List the data sets, then exit.")
    ] = False,
) -> None:
    """Write the manifest of a data set as people have it after download.

    Rows are matched with the videos that are there; what does not match is reported. An interrupted
    run continues where it was. docs/datasets has a page for each data set.
    """
    if show_list:
        _print_list()
        return
    from kinema.cli.this_machine import refuse_url
    from kinema.config.errors import KinemaError
    from kinema.curation.importers.dataset import Request
    from kinema.curation.importers.run import import_data

    if name is None:
        raise typer.BadParameter("NAME is missing; --list shows all", param_hint="NAME")
    if output is None:
        raise typer.BadParameter("say where to write: -o MANIFEST.parquet", param_hint="-o")
    if prefer not in (None, "clips", "cuts"):
        raise KinemaError(f"{prefer!r} is neither clips nor cuts", where="--as")
    for place in (*(sources or ()), videos, extract, output):
        refuse_url(place, "what `kinema data import` works on", hint="download it first")
    request = Request(tuple(sources or ()), videos, extract, encoding, text_column, path_column)
    try:
        result = import_data(
            name,
            request,
            output,
            prefer="clips" if prefer == "clips" else "cuts" if prefer == "cuts" else None,
            trust_table=trust_table,
            data_root=data_root,
            workers=workers,
            timeout_s=timeout,
            report=report,
        )
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command again continues from here", err=True)
        raise typer.Exit(130) from None
    _print(result, output)


def _print_list() -> None:
    from kinema.curation.importers.catalog import DATA_SETS

    width = max(len(entry.name) for entry in DATA_SETS)
    for entry in DATA_SETS:
        print(f"{entry.name:{width}}  {entry.title}: {entry.line}")


def _print(result: ImportReport, output: Path) -> None:
    from kinema.curation.importers.findings import IN_PASSING, MEANING

    of = f"of {result.data_set.title}, {result.table_rows:,} rows in its tables"
    if result.kind == "clips":
        reused = f", {result.reused:,} files known from an earlier run" if result.reused else ""
        print(f"{output}: {result.rows:,} clips {of}{reused}")
    else:
        videos = f"{result.videos:,} video{'' if result.videos == 1 else 's'}"
        print(f"{output}: {result.rows:,} cuts in {videos} {of}")
    if result.text_column is None:
        print("captions: none in the table (kinema curate can write them)")
    else:
        print(f"captions: {result.with_caption:,} of {result.rows:,} from {result.text_column!r}")
    if result.columns:
        print(f"other columns: {', '.join(result.columns)}")
    for note in result.notes:
        print(f"note: {note}")
    for reason, count in result.findings.counts().items():
        left_out = "" if reason in IN_PASSING else "left out: "
        print(f"{left_out}{count:,} {reason}: {MEANING.get(reason, 'files that cannot be used')}")
        for path, message in result.findings.lines[reason][: SHOWN // 4]:
            print(f"  {path}: {message}")
    if result.findings.lines:
        print(f"all of them: {result.report}")
    if result.kind == "cuts":
        print(f"next: kinema curate {output} -o FOLDER")
    else:
        print(f"next: kinema data plan {output} RECIPE")
