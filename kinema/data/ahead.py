"""The next micro-batch is put together by a thread while the device works on this one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
TELL_EVERY_S = 0.1


class OneAhead(Iterator[Item], Generic[Item]):
    """The items of a generator, the same and in the same order, each begun one early.

    What the generator raises is raised where its item would have come. Filling the pixels of a
    micro-batch into one tensor takes a large part of a second; on a GPU nothing is lost by doing it
    beside a step, on a CPU it would only compete with it.

    Args:
        items: runs in a thread of its own from now on.
        while_waiting: called by who waits for an item, ten times a second.
    """

    def __init__(
        self,
        items: Generator[Item, None, None],
        *,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._items = items
        self._while_waiting = while_waiting
        self._thread = ThreadPoolExecutor(1, "micro-batch")
        self._coming = self._thread.submit(next, items, None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        while not wait([self._coming], TELL_EVERY_S).done:
            self._while_waiting()
        item = self._coming.result()
        if item is None:
            raise StopIteration
        self._coming = self._thread.submit(next, self._items, None)
        return item

    def close(self) -> None:
        """End the generator, when it has made what it is at."""
        self._coming.cancel()
        self._thread.shutdown()
        self._items.close()
