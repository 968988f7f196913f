"""Processes find each other whatever an earlier start has left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from kinema.parallel.meeting import meet

LIMIT = timedelta(seconds=20)


def start_all(store: dist.Store, size: int) -> list[dist.Store]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: meet(store, rank, size, timeout=LIMIT), range(size)))


def test_every_start_has_keys_of_its_own() -> None:
    store = dist.HashStore()
    first = start_all(store, 3)
    first[1].set("address", "of a process that is dead")
    second = start_all(store, 3)  # the hellos of the first are still there
    assert not second[0].check(["address"])
    second[2].set("address", "new")
    assert [one.get("address") for one in second] == [b"new"] * 3
    assert first[0].get("address") == b"of a process that is dead"


def test_a_start_that_was_broken_off_half_way_does_no_harm() -> None:
    store = dist.HashStore()
    store.set("kinema/hello/1", "a word that nobody waits for")
    store.set("kinema/hello/2", "nor for this one")
    assert len(start_all(store, 3)) == 3


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(TimeoutError, match=r"did not come: 1, 2$"):
        meet(dist.HashStore(), 0, 3, timeout=timedelta(seconds=0.1))
