"""Copies in the host's memory (on a GPU the same, beside the computation: not run here)."""

from __future__ import annotations

import torch

from kinema.training.host_copies import HostCopies


def test_copies_stay_as_they_were_and_their_memory_is_used_again() -> None:
    copies = HostCopies(torch.device("cpu"))
    live = torch.arange(6.0).reshape(2, 3)
    copies.reserve({"w": (live.shape, live.dtype)})
    first = copies.take("w", live)
    copies.taken()
    copies.hold_changes()
    live.add_(1)
    copies.wait()
    assert torch.equal(first, torch.arange(6.0).reshape(2, 3))
    second = copies.take("w", live)
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, live)


def test_another_shape_gets_memory_of_its_own() -> None:
    copies = HostCopies(torch.device("cpu"))
    first = copies.take("w", torch.zeros(2))
    second = copies.take("w", torch.ones(3, dtype=torch.float64).t())
    assert (second.shape, second.dtype) == (torch.Size([3]), torch.float64)
    assert not first.any()
