"""`kinema data`: manifests, from a folder of files to a checked table of clips."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kinema.data.index import IndexReport

data_app = typer.Typer(
    help="Manifests: make, check, look into.", no_args_is_help=True, rich_markup_mode=None
)
SHOWN = 8
"""Refused files to name on the screen; the report has all."""

ManifestPath = Annotated[
    str, typer.Argument(metavar="MANIFEST", help=".csv or .parquet, here or in a store (s3://...)")
]
DataRoot = Annotated[
    str | None,
    typer.Option(help="Folder that paths are relative to (default: the manifest's own)."),
]
Workers = Annotated[
    int, typer.Option(min=1, show_default="all cores", help="Processes that read files.")
]


def register(app: typer.Typer) -> None:
    # Their commands join `data_app`.
    from kinema.cli import data_browse, data_import, data_order, data_tables

    assert data_order
    assert data_tables
    assert data_import
    assert data_browse
    app.add_typer(data_app, name="data")


@data_app.command()
def index(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of videos and images.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Manifest to write: .csv or .parquet.")
    ],
    captions: Annotated[
        Path | None,
        typer.Option(help="Table of captions: path,text or video,caption. Default: .txt files."),
    ] = None,
    data_root: DataRoot = None,
    workers: Workers = os.cpu_count() or 1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one file.")] = 20.0,
    report: Annotated[
        Path | None,
        typer.Option(help="What was refused and why. Default: OUTPUT.report.jsonl."),
    ] = None,
) -> None:
    """Write a manifest of the videos and images below a folder.

    Files that cannot be used are reported and left out. An interrupted run continues where it was.
    """
    from kinema.cli.this_machine import refuse_url
    from kinema.data.index import index_folder

    url = f"kinema curate {folder}".replace(":/", "://", 1)
    refuse_url(folder, "what is indexed", hint=f"{url} --recipe curate/clips -o OUT, for a store")
    refuse_url(output, "the manifest", hint="write it here; `kinema data filter` copies it")
    try:
        result = index_folder(
            folder,
            output,
            captions=captions,
            data_root=data_root,
            workers=workers,
            timeout_s=timeout,
            report=report,
        )
    except KeyboardInterrupt:
        typer.echo("interrupted: the same command again continues from here", err=True)
        raise typer.Exit(130) from None
    _print_index(result, output)


def _print_index(result: IndexReport, output: Path) -> None:
    reused = f" ({result.reused} files known from an earlier run)" if result.reused else ""
    print(f"{output}: {result.rows} clips{reused}")
    captions, without = result.captions, result.without_caption
    if len(without) == result.rows:
        found = "NONE found" if captions.source == "none" else f"NONE in {captions.source}"
        print(f"captions: {found}; training a text-to-video model needs them (--captions)")
    else:
        print(f"captions: {result.rows - len(without)} clips from {captions.source}")
        if without:
            _print_some(f"without a caption (kept out of training): {len(without)}", without)
        if captions.unused:
            lines = [f"{item.path}: {item.message}" for item in captions.unused]
            _print_some(f"captions not used: {len(lines)}", lines)
    if result.refused:
        counts = ", ".join(f"{reason} {n}" for reason, n in result.reasons().items())
        lines = [f"{item.path}: {item.message}" for item in result.refused]
        _print_some(f"refused: {len(lines)} files ({counts})", lines)
    if result.report.stat().st_size:
        print(f"all of them: {result.report}")


def _print_some(title: str, lines: list[str]) -> None:
    print(title)
    for line in lines[:SHOWN]:
        print(f"  {line}")
    if len(lines) > SHOWN:
        print(f"  and {len(lines) - SHOWN} more")


@data_app.command()
def check(
    manifest: ManifestPath,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="Write the manifest with bad rows marked as dropped."),
    ] = None,
    data_root: DataRoot = None,
    workers: Workers = os.cpu_count() or 1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one file.")] = 300.0,
) -> None:
    """Decode every clip fully and compare it with its row; fails if one is bad."""
    from kinema.data.check import check_manifest, mark_bad
    from kinema.data.manifest import Manifest
    from kinema.data.table_file import check_place

    if output:
        check_place(output)
    table = Manifest.read(manifest, data_root=data_root)
    bad = check_manifest(table, workers=workers, timeout_s=timeout)
    for item in bad:
        print(f"row {item.row}: {item.path}: {item.message} [{item.reason}]")
    checked = int(table.kept.sum())
    dropped = (
        f", {len(table) - checked} dropped before were not looked at"
        if checked < len(table)
        else ""
    )
    print(f"{manifest}: {checked - len(bad)} of {checked} clips are good{dropped}")
    if not (table.kept & ~table.blank).any():
        print(
            "no clip has a caption; training a text-to-video model needs them: "
            f"kinema curate caption {manifest} -o NEW caption.model=MODEL"
        )
    if output:
        mark_bad(table, bad).write(output, data_root=data_root)
        print(f"{output}: written, bad rows have `dropped_by`")
    if bad:
        raise typer.Exit(1)
