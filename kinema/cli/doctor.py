"""`kinema doctor`: is this machine ready, and if not, what to do."""

from __future__ import annotations

import json
from pathlib import Path

import typer

MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    folder: Path = typer.Option(Path(), help="Where data and runs will be written."),
    as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON."),
) -> None:
    """Check Python, torch, GPU, attention kernels, video codecs, disk, memory and extras.

    Exit code 1 if something stands in the way.
    """
    from kinema.doctor import examine

    findings = examine(folder)
    problems = [f for f in findings if f.status == "problem"]
    if as_json:
        print(json.dumps([f.as_dict() for f in findings], indent=2))
    else:
        width = max(len(f.name) for f in findings)
        for finding in findings:
            print(f"{MARKS[finding.status]:>7}  {finding.name:<{width}}  {finding.detail}")
            if finding.advice:
                print(f"{'':>7}  {'':<{width}}  -> {finding.advice}")
        print()
        print("ready" if not problems else f"{len(problems)} problem(s) stand in the way")
    raise typer.Exit(1 if problems else 0)
