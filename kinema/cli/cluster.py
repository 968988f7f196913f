"""`kinema cluster`: training on many machines, started, watched and stopped over ssh."""

from __future__ import annotations

import importlib

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Set up, start, watch and stop training on many machines (OpenSSH underneath).",
)

PARTS: tuple[str, ...] = (
    "cluster_launch",
    "cluster_processes",
    "cluster_files",
    "cluster_health",
)
"""Modules of this folder that add commands to the group; each has `register_cluster(app)`."""


def register(root: typer.Typer) -> None:
    for name in PARTS:
        importlib.import_module(f"kinema.cli.{name}").register_cluster(app)
    root.add_typer(app, name="cluster")
