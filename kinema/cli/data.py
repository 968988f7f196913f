"""`kinema data`: manifests, from a folder of files to a checked table of clips."""

from __future__ import annotations

import importlib.util

import typer

data_app = typer.Typer(
    help="Manifests: make, check, look into.", no_args_is_help=True, rich_markup_mode=None
)


def register(app: typer.Typer) -> None:
    if importlib.util.find_spec("kinema.cli.data_order"):
        importlib.import_module("kinema.cli.data_order")
    app.add_typer(data_app, name="data")
