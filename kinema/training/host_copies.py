"""Tensors put aside in the host's memory while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopies:
    """Copies on the CPU, in buffers that stay for the next time: no page is asked for twice.

    From a GPU they are made beside the computation: take everything, call `taken`, go on; before
    the tensors change, call `hold_changes`; before the copies are read, `wait`.

    Args:
        device: where the tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._last: torch.cuda.Event | None = None

    def reserve(self, tensors: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        """Make the buffers for tensors of these names, shapes and dtypes."""
        for name, (shape, dtype) in tensors.items():
            self._buffer(name, shape, dtype).zero_()  # memory is not there before it is written to

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a tensor, contiguous, valid after `wait` and until the next one of that
        name."""
        buffer = self._buffer(name, tensor.shape, tensor.dtype)
        if self._stream is None or not tensor.is_cuda:
            return buffer.copy_(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return buffer

    def taken(self) -> None:
        """Say that this was all for now."""
        if self._stream is not None:
            self._last = self._stream.record_event()

    def hold_changes(self) -> None:
        """Let what is queued on the GPU from here on begin after the copies; the host goes on."""
        if self._last is not None:
            torch.cuda.current_stream(self._device).wait_event(self._last)

    def wait(self) -> None:
        """Until the copies are there; from any thread."""
        if self._last is not None:
            self._last.synchronize()

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        found = self._buffers.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            pinned = self._stream is not None
            found = torch.empty(shape, dtype=dtype, pin_memory=pinned)
            self._buffers[name] = found
        return found
