"""The `kinema` command: one thin module per command group, errors without tracebacks.

Modules of this room import only typer and the standard library at their top; what a command
needs is imported inside it, so that `kinema --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from kinema.cli import commands


class _Root(TyperGroup):
    """Ends two things well that Typer would end without a word, as if the command had failed."""

    def invoke(self, ctx: Any) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # `kinema ... | head`: the reader has what it wanted.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None


app = typer.Typer(
    name="kinema",
    cls=_Root,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"kinema {version('kinema')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Open text-to-video: curate, train, generate, serve; on a laptop or a cluster."""


commands.register(app)


def _error() -> str:
    """How a message begins; of torchrun's processes, all but the first name themselves."""
    rank = os.environ.get("RANK", "0")
    return "error" if rank == "0" else f"error on rank {rank}"


def main() -> None:
    """Entry point: a person's mistake ends in a message and a non-zero exit, never a traceback."""
    # Threads that spin while they wait slow a busy CPU down 3-20 times; set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except OSError as error:
        if os.environ.get("KINEMA_TRACEBACK"):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{_error()}: {where}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from None
    except ValueError as error:
        from kinema.config.errors import KinemaError

        if not isinstance(error, KinemaError) or os.environ.get("KINEMA_TRACEBACK"):
            raise
        print(f"{_error()}: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
