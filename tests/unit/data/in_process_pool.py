"""Stands in for the decode pool where a test is about what is done with its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

from kinema.media.errors import MediaError


class InProcessPool:
    """Calls the function here, one item after the other, and remembers the paths."""

    opened: ClassVar[list[str]] = []
    stop_after: ClassVar[int | None] = None
    """Raise KeyboardInterrupt instead of opening another file."""

    def __init__(self, workers: int, timeout_s: float) -> None:
        assert workers >= 1
        assert timeout_s > 0

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        call: Callable[[Any], tuple[Any, ...]],
        ordered: bool = True,
    ) -> Iterator[tuple[Any, Any]]:
        for item in items:
            if InProcessPool.stop_after == len(InProcessPool.opened):
                raise KeyboardInterrupt
            arguments = call(item)
            InProcessPool.opened.append(Path(arguments[0]).name)
            try:
                yield item, function(*arguments)
            except MediaError as error:
                yield item, error

    def __enter__(self) -> Self:
        InProcessPool.opened.clear()
        return self

    def __exit__(self, *_: object) -> None:
        InProcessPool.stop_after = None
