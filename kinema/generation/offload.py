"""Networks larger than memory: blocks come in when they are called, and go again.

Only the blocks of a network (the entries of its `ModuleList`s) are streamed; what stands around
them stays. The arithmetic is that of the whole network, so results are the same to the bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Read = Callable[[str], Tensor]
"""One tensor of a network by its full name, on the CPU, in any floating-point dtype."""

RESIDENT = 2
"""Blocks in memory at once: the one that runs and the one that comes next."""
ALIGN = 256
"""Bytes: where tensors start in a block's buffer; kernels want their operands aligned."""


@dataclass
class Place:
    """Where one streamed tensor belongs, and where it stands in its block's buffer."""

    name: str
    owner: nn.Module
    leaf: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor inside a block's buffer (uint8)."""
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)

    def put(self, value: Tensor) -> None:
        """Make `value` the owner's tensor."""
        if self.leaf in self.owner._parameters:
            self.owner._parameters[self.leaf] = nn.Parameter(value, requires_grad=False)
        else:
            self.owner._buffers[self.leaf] = value

    def clear(self) -> None:
        self.put(torch.empty(self.shape, dtype=self.dtype, device="meta"))


@dataclass
class Block:
    """One streamed block."""

    name: str
    module: nn.Module
    places: list[Place] = field(default_factory=list)
    resident: bool = False

    @property
    def nbytes(self) -> int:
        last = self.places[-1]
        return -(-(last.offset + last.nbytes) // ALIGN) * ALIGN

    def put(self, buffer: Tensor) -> None:
        for place in self.places:
            place.put(place.view(buffer))
        self.resident = True

    def clear(self) -> None:
        for place in self.places:
            place.clear()
        self.resident = False


def blocks_of(network: nn.Module) -> list[Block]:
    """The blocks that can be streamed, with their tensors; tensors that several share stay put."""
    counts: dict[int, int] = {}
    for module in network.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                counts[id(tensor)] = counts.get(id(tensor), 0) + 1
    blocks = []
    for name, module in _entries(network, ""):
        block = Block(name, module)
        end = 0
        for path, owner in module.named_modules():
            tensors = dict(owner._parameters)
            tensors |= {
                leaf: buffer
                for leaf, buffer in owner._buffers.items()
                if leaf not in owner._non_persistent_buffers_set
            }
            for leaf, tensor in tensors.items():
                if tensor is None or counts[id(tensor)] > 1:
                    continue
                full = ".".join(part for part in (name, path, leaf) if part)
                place = Place(full, owner, leaf, tensor.shape, tensor.dtype, end)
                block.places.append(place)
                end = math.ceil((end + place.nbytes) / ALIGN) * ALIGN
        if block.places:
            blocks.append(block)
    return blocks


def _entries(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Entries of the outermost `ModuleList`s, by name."""
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(child, nn.ModuleList):
            yield from ((f"{path}.{i}", entry) for i, entry in enumerate(child))
        else:
            yield from _entries(child, path)


class Shelf(Protocol):
    """Brings a block's tensors to the device that computes."""

    def fetch(self, block: Block) -> None:
        """Begin to bring a block, for `take` to wait for."""
        ...

    def take(self, block: Block) -> None:
        """Put a block in its place, ready to run."""
        ...

    def give_back(self, block: Block) -> None:
        """The block has been called; its memory may go to another."""
        ...

    def read(self, place: Place) -> Tensor:
        """One tensor alone, on the device that computes."""
        ...

    def close(self) -> None: ...


class FileShelf:
    """Blocks in files, read by a thread of their own while the block before computes (CPU)."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self._coming: dict[str, Future[Tensor]] = {}

    def fetch(self, block: Block) -> None:
        """See `Shelf`."""
        if block.name not in self._coming:
            self._coming[block.name] = self._reader.submit(self._load, block)

    def take(self, block: Block) -> None:
        """See `Shelf`."""
        self.fetch(block)
        block.put(self._coming.pop(block.name).result())

    def give_back(self, block: Block) -> None:
        """See `Shelf`."""
        block.clear()

    def read(self, place: Place) -> Tensor:
        """See `Shelf`."""
        return self._read(place.name).to(place.dtype)

    def close(self) -> None:
        """Stop the thread."""
        self._reader.shutdown(cancel_futures=True)
        self._coming.clear()

    def _load(self, block: Block) -> Tensor:
        buffer = torch.empty(block.nbytes, dtype=torch.uint8)
        for place in block.places:
            place.view(buffer).copy_(self._read(place.name))
        return buffer


@dataclass
class _Slot:
    """Memory on a GPU for one block."""

    buffer: Tensor
    ready: torch.cuda.Event
    free: torch.cuda.Event
    block: Block | None = None


class PinnedShelf:
    """Blocks in pinned host memory, copied to a GPU on a stream of their own.

    The copy into a slot waits, on the GPU, for the block that last computed from it; the host
    never waits, and no more than `RESIDENT` blocks are on the GPU whatever it runs ahead.
    """

    def __init__(self, blocks: list[Block], read: Read, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._host = {block.name: self._pinned(block, read) for block in blocks}
        size = max(block.nbytes for block in blocks)
        self._slots = [
            _Slot(
                torch.empty(size, dtype=torch.uint8, device=device),
                torch.cuda.Event(),
                torch.cuda.Event(),
            )
            for _ in range(RESIDENT)
        ]
        # Slots were made on the current stream; copies must not begin before that.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def fetch(self, block: Block) -> None:
        """See `Shelf`."""
        if self._slot_of(block) is not None:
            return
        slot = next(s for s in self._slots if s.block is None or not s.block.resident)
        slot.block = block
        # An event that was never recorded is passed at once.
        self._stream.wait_event(slot.free)
        with torch.cuda.stream(self._stream):
            slot.buffer[: block.nbytes].copy_(self._host[block.name], non_blocking=True)
            slot.ready.record(self._stream)

    def take(self, block: Block) -> None:
        """See `Shelf`."""
        self.fetch(block)
        slot = self._slot_of(block)
        assert slot is not None
        torch.cuda.current_stream(self._device).wait_event(slot.ready)
        block.put(slot.buffer)

    def give_back(self, block: Block) -> None:
        """See `Shelf`."""
        slot = self._slot_of(block)
        assert slot is not None
        slot.free.record(torch.cuda.current_stream(self._device))
        slot.block = None
        block.clear()

    def read(self, place: Place) -> Tensor:
        """See `Shelf`."""
        block = next(name for name in self._host if place.name.startswith(f"{name}."))
        return place.view(self._host[block]).to(self._device)

    def close(self) -> None:
        """Let go of host and GPU memory."""
        torch.cuda.synchronize(self._device)
        self._slots.clear()
        self._host.clear()

    def _slot_of(self, block: Block) -> _Slot | None:
        return next((s for s in self._slots if s.block is block), None)

    def _pinned(self, block: Block, read: Read) -> Tensor:
        pinned = self._device.type == "cuda"  # tests stand a CPU in for a GPU
        buffer = torch.empty(block.nbytes, dtype=torch.uint8, pin_memory=pinned)
        for place in block.places:
            place.view(buffer).copy_(read(place.name))
        return buffer


class LayerStream:
    """Streams the blocks of a network while it is used; a context manager.

    Which block followed which is remembered, so that from the second pass on the next block comes
    while one computes. A layer of a block that is called outside of the block (text keys and
    values, worked out once for all steps) gets its own tensors alone for that call.

    Args:
        network: its blocks' tensors are replaced; everything else must be on `device`.
        read: where the blocks' tensors come from.
        device: that computes.
    """

    def __init__(self, network: nn.Module, read: Read, device: torch.device) -> None:
        self.blocks = blocks_of(network)
        self._shelf: Shelf = (
            PinnedShelf(self.blocks, read, device) if device.type == "cuda" else FileShelf(read)
        )
        self._last: Block | None = None
        self._after: dict[str, Block] = {}  # which block came after which, the last time
        self._hooks: list[Any] = []

    def __enter__(self) -> LayerStream:
        for block in self.blocks:
            block.clear()
            self._hook(block.module, self._before_block(block), self._after_block(block))
            for owner in {id(p.owner): p.owner for p in block.places}.values():
                if owner is not block.module:
                    alone = [p for p in block.places if p.owner is owner]
                    self._hook(owner, self._before_alone(block, alone), self._clear(block, alone))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._shelf.close()

    def _hook(
        self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]
    ) -> None:
        self._hooks.append(module.register_forward_pre_hook(before))
        # Always: a failed forward must not leave its block behind.
        self._hooks.append(module.register_forward_hook(after, always_call=True))

    def _before_block(self, block: Block) -> Callable[..., None]:
        def before(*_: object) -> None:
            self._shelf.take(block)
            if self._last is not None:
                self._after[self._last.name] = block
            self._last = block
            following = self._after.get(block.name, block)
            if following is not block:
                self._shelf.fetch(following)

        return before

    def _after_block(self, block: Block) -> Callable[..., None]:
        def after(*_: object) -> None:
            if block.resident:
                self._shelf.give_back(block)

        return after

    def _before_alone(self, block: Block, places: list[Place]) -> Callable[..., None]:
        def before(*_: object) -> None:
            if not block.resident:
                for place in places:
                    place.put(self._shelf.read(place))

        return before

    def _clear(self, block: Block, places: list[Place]) -> Callable[..., None]:
        def after(*_: object) -> None:
            if not block.resident:
                for place in places:
                    place.clear()

        return after


@contextlib.contextmanager
def streamed(network: nn.Module, read: Read | None, device: torch.device) -> Iterator[nn.Module]:
    """`network` with its blocks streamed from `read`; with None as it is."""
    if read is None:
        yield network
        return
    with LayerStream(network, read, device):
        yield network
