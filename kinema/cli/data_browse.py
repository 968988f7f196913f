"""`kinema data browse`: look at a manifest's clips in the browser."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kinema.cli.data import data_app


@data_app.command()
def browse(
    manifest: Annotated[
        str,
        typer.Argument(metavar="MANIFEST", help=".csv or .parquet, or the folder of a curation."),
    ],
    data_root: Annotated[
        str | None,
        typer.Option(help="Folder that paths are relative to (default: the manifest's own)."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port. Default: the first free one from 8765 on."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; others than loopback get a secret token.")
    ] = "127.0.0.1",
    open_page: Annotated[
        bool, typer.Option("--open", help="Open the page in this machine's browser.")
    ] = False,
) -> None:
    """Serve a page with a manifest's clips: play, filter, sort, search, mark, edit, export.

    The manifest is never changed: marks and edited captions are kept in MANIFEST.edits.jsonl.
    """
    from kinema.config.errors import KinemaError

    try:
        from kinema.serving.browse import server
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("fastapi", "uvicorn", "starlette"):
            raise
        raise KinemaError(
            f"the page needs the package {error.name}", hint="pip install 'kinema[serve]'"
        ) from None

    def say(line: str) -> None:
        # At once, even into a pipe: who started it waits for the address.
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)

    server.browse(manifest, data_root=data_root, host=host, port=port, open_page=open_page, say=say)
