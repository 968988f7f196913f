"""Decoding where it can be killed: worker processes with a time limit for every file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeVar

from kinema.media.errors import MediaError

Item = TypeVar("Item")
Result = TypeVar("Result")


class DecodePool:
    """Runs `function(path, *args)` in processes that are killed past the time limit."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        raise NotImplementedError

    def submit(
        self, function: Callable[..., Result], path: str | os.PathLike[str], *args: Any
    ) -> Future[Result]:
        """Start a call; the future raises MediaError if the file fails, hangs or kills its worker.

        Args:
            function: importable by name, from a module that is cheap to import (no torch).
            path: the file, handed to `function` first and named in errors.
            args: further arguments, picklable.
        """
        raise NotImplementedError

    def map(
        self,
        function: Callable[..., Result],
        items: Iterable[Item],
        *,
        call: Callable[[Item], tuple[Any, ...]] | None = None,
        ordered: bool = True,
        in_flight: int | None = None,
    ) -> Iterator[tuple[Item, Result | MediaError]]:
        """`(item, result or error)` for every item, in order or as they come.

        Args:
            function: as for `submit`.
            items: may be endless; at most `in_flight` are taken ahead.
            call: `item -> (path, *args)`; by default the item is the path.
            ordered: False yields results as they come.
            in_flight: calls started and not yet yielded (default: four per worker).
        """
        raise NotImplementedError

    def close(self) -> None:
        """Kill the workers; calls not finished are cancelled."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
