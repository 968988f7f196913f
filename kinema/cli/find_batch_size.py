"""`kinema train RECIPE --find-batch-size`: what fits the device at hand."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from kinema.training.config import TrainRecipe
    from kinema.training.find_batch_size import Found

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
         "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


def find_and_print(
    recipe: TrainRecipe,
    *,
    device: str | None,
    fraction: float | None,
    limit: str | None,
    ranks: int | None,
) -> None:
    """Find batch sizes, and print a table and lines for the recipe."""
    from kinema.generation.memory import in_words
    from kinema.training.find_batch_size import find_batch_sizes
    from kinema.training.fit import as_yaml

    result = find_batch_sizes(
        recipe,
        device=device,
        fraction=0.9 if fraction is None else fraction,
        limit=None if limit is None else size_of(limit),
        ranks=ranks or 1,
    )
    print(_table(result.found))
    print(f"\na run may take {in_words(result.available)}")
    for item in result.found:
        if not item.most:
            print(f"not one clip of {item.length.bucket} fits: it takes {in_words(item.needed)}")
        elif item.seconds is None:
            print(f"{item.length.bucket}: several ranks share its clips; predicted, not run")
    if not any(item.most for item in result.found):
        raise typer.Exit(1)
    print("\n# the most that fits")
    print(as_yaml(result.largest))
    print("\n# equal step times")
    print(as_yaml(result.equal))


def refuse_alone(needed: str, **options: object) -> None:
    """Options that say nothing without another one, `needed`.

    Raises:
        ConfigError: one was given.
    """
    from kinema.config.errors import ConfigError

    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} goes with {needed}",
                hint=f"add {needed}, or leave it out",
            )


def size_of(text: str) -> int:
    """Bytes of `2GB`, `512MiB`, `1000000`.

    Raises:
        ConfigError: it is no size.
    """
    from kinema.config.errors import ConfigError

    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if found is None or found[2] not in UNITS or float(found[1]) <= 0:
        raise ConfigError(f"{text!r} is no size", where="--memory-limit", hint="such as 16GB")
    return int(float(found[1]) * UNITS[found[2]])


def _table(found: list[Found]) -> str:
    from rich.console import Console
    from rich.table import Table

    from kinema.generation.memory import in_words

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("bucket")
    for name in ("recipe", "predicted", "fits", "memory", "seconds", "clips/s"):
        table.add_column(name, justify="right")
    for item in found:
        seconds = item.seconds
        table.add_row(
            str(item.length.bucket),
            str(item.length.batch),
            str(item.length.most),
            str(item.most),
            in_words(item.needed),
            "-" if seconds is None else f"{seconds:.3g}",
            "-" if seconds is None else f"{item.most / seconds:.3g}",
        )
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")
