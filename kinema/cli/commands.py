"""Which commands there are."""

from __future__ import annotations

import importlib

import typer

MODULES = (
    "demo",
    "doctor",
    "models",
    "weights",
    "curate",
    "data",
    "plan",
    "text",
    "latents",
    "train",
    "generate",
    "cluster",
)
"""Modules of this folder, in the order of `kinema --help`; each has `register(app)`."""


def register(app: typer.Typer) -> None:
    for name in MODULES:
        importlib.import_module(f"kinema.cli.{name}").register(app)
