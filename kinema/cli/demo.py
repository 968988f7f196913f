"""`kinema demo`: from nothing, or from a folder of videos, to a model and its videos."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    out: Path = typer.Option(
        Path("demo"), help="Folder for everything; an unfinished demo in it goes on."
    ),
    quick: bool = typer.Option(
        False, "--quick", help="A smoke run of about a minute; nothing is learnt."
    ),
    videos: Path | None = typer.Option(
        None, help="A folder of your own videos instead of the procedural world."
    ),
    captions: Path | None = typer.Option(
        None, help="Their captions: CSV with path,text; else .txt files beside the videos."
    ),
    seed: int = typer.Option(0, help="Another seed: another world, another model."),
) -> None:
    """Render a small world of captioned clips, train on it, generate, measure, report.

    Takes about nine minutes on two CPU cores. Fails when the colours of the generated videos do
    not follow the prompts.
    """
    import sys

    from kinema.config.settings import from_dict
    from kinema.demo.config import WANTED_ACCURACY, DemoConfig
    from kinema.demo.run import run_demo

    settings = {
        "seed": seed,
        "quick": quick,
        "videos": str(videos.absolute()) if videos else None,
        "captions": str(captions.absolute()) if captions else None,
    }
    config = from_dict(DemoConfig, settings, where="kinema demo")
    result = run_demo(out, config)
    print(result.report)
    if result.accuracy is not None:
        verdict = (
            "" if result.passed else f", below the {WANTED_ACCURACY:.0%} that a demo must reach"
        )
        if quick:
            verdict = " (a smoke run: not expected to be right)"
        print(f"colour right in {result.accuracy:.0%} of the prompts{verdict}", file=sys.stderr)
    if not result.passed:
        raise SystemExit(1)
