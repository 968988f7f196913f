"""The optimizer section: a folder of PyTorch's distributed checkpoint, tensors only.

Every rank writes the shards it holds; of what several hold alike, one of them. Who that is follows
from the layout, so that no rank has to ask another. Any number of ranks reads it in any layout.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    SavePlan,
)
from torch.distributed.checkpoint import metadata as metadata_classes
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from kinema.checkpoint.errors import CheckpointError

CONTENTS = ".metadata"
"""The table of contents."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor as one rank wrote it."""

    tensor: str
    dtype: str
    """float32."""
    size: list[int]
    """Of the whole tensor."""
    offsets: list[int]
    """Where in it the piece begins."""
    lengths: list[int]
    file: str
    begin: int
    """Byte in the file."""
    bytes: int


class OptimizerShare:
    """What one rank writes of a flat dict of tensors, planned once for all saves.

    Args:
        tensors: plain ones, the same on every rank, and DTensors.
        rank: of `ranks` that save together.

    Attributes:
        tensors: the local pieces that this rank writes, by name: the live ones.
    """

    def __init__(self, tensors: Mapping[str, Tensor], rank: int, ranks: int) -> None:
        not_tensors = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
        assert not not_tensors, f"numbers belong into state.json: {not_tensors[:3]}"
        mine = _written_by(tensors, rank, ranks)
        planner = DefaultSavePlanner()
        planner.set_up_planner(mine, is_coordinator=True)
        plan = planner.create_local_plan()
        # A rank may hold no row of a small tensor.
        self._items = [
            i for i in plan.items if i.tensor_data and 0 not in i.tensor_data.chunk.sizes
        ]
        written = {item.index.fqn for item in self._items}
        self._rank = rank
        self.tensors = {
            name: (value.to_local() if isinstance(value, DTensor) else value).detach()
            for name, value in mine.items()
            if name in written
        }

    def write(self, folder: Path, values: Mapping[str, Tensor]) -> list[Chunk]:
        """Write one file into a new or existing folder, flushed to disk; nothing where nothing is
        to be written.

        Args:
            values: of `tensors`, on the CPU or on their device.
        """
        if not self._items:
            return []
        writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
        plan = writer.prepare_local_plan(SavePlan(self._items))
        # Called as the coordinator would, which names the files by rank.
        plan = writer.prepare_global_plan([SavePlan([])] * self._rank + [plan])[self._rank]
        results = writer.write_data(plan, _Values(values)).wait()
        of = {item.index: item.tensor_data for item in self._items}
        return [_chunk(result, of[result.index]) for result in results]


def write_contents(folder: Path, chunks: Sequence[Chunk]) -> None:
    """Write the table of contents over what all ranks wrote, flushed to disk."""
    tensors: dict[str, Any] = {}
    results = []
    for chunk in chunks:
        offsets, lengths = torch.Size(chunk.offsets), torch.Size(chunk.lengths)
        properties = TensorProperties(dtype=getattr(torch, chunk.dtype))
        whole = TensorStorageMetadata(properties, torch.Size(chunk.size), [])
        tensors.setdefault(chunk.tensor, whole).chunks.append(
            ChunkStorageMetadata(offsets=offsets, sizes=lengths)
        )
        place = _StorageInfo(chunk.file, chunk.begin, chunk.bytes)
        results.append(WriteResult(MetadataIndex(chunk.tensor, offsets), chunk.bytes, place))
    FileSystemWriter(folder, sync_files=True).finish(Metadata(tensors), [results])


def _written_by(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """Of every piece that several ranks hold, one writes it: in turn, or the one with least."""
    mine: dict[str, Tensor] = {}
    loads = [0] * ranks
    for number, (name, value) in enumerate(tensors.items()):
        if isinstance(value, DTensor):
            copy, copies = _copy_of(value)
            if copy == number % copies:
                mine[name] = value
            continue
        least = min(range(ranks), key=loads.__getitem__)
        loads[least] += value.nbytes
        if least == rank:
            mine[name] = value
    return mine


def _copy_of(tensor: DTensor) -> tuple[int, int]:
    """Which of how many copies of its piece this rank holds."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank that holds nothing of a tensor does not save it"
    copy, copies = 0, 1
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copy = copy * mesh.size(axis) + coordinate[axis]
            copies *= mesh.size(axis)
    return copy, copies


def _chunk(result: WriteResult, written: Any) -> Chunk:
    place = result.storage_data
    return Chunk(
        tensor=result.index.fqn,
        dtype=str(written.properties.dtype).removeprefix("torch."),
        size=list(written.size),
        offsets=list(written.chunk.offsets),
        lengths=list(written.chunk.sizes),
        file=place.relative_path,
        begin=place.offset,
        bytes=place.length,
    )


class _Values(DefaultSavePlanner):
    """Hands the writer values that were put aside, where the live ones have moved on."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._values[write_item.index.fqn]


def read_optimizer(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of `into` in place.

    Raises:
        CheckpointError: other names or shapes than were saved, or an unreadable folder.
    """
    reader = _Reader(folder)
    saved = {
        name: entry.size
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    problems = [f"{n} is missing from the checkpoint" for n in into if n not in saved]
    problems += [f"{n} is unknown to the optimizer" for n in saved if n not in into]
    problems += [
        f"{n} is {list(saved[n])} in the checkpoint, {list(t.shape)} here"
        for n, t in into.items()
        if n in saved and saved[n] != t.shape
    ]
    if problems:
        raise CheckpointError(
            f"the optimizer's state does not fit: {len(problems)} differences "
            f"({'; '.join(problems[:3])})",
            where=str(folder),
            hint="resume with the model and optimizer settings of the run",
        )
    with _single_process():
        dcp.load(dict(into), storage_reader=reader, no_dist=True)


@contextmanager
def _single_process() -> Iterator[None]:
    """Without PyTorch's warning that there is no process group: there is none on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Reader(FileSystemReader):
    """Reads the pickled table of contents without letting it run anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / CONTENTS
        try:
            with file.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, OSError, AttributeError, ImportError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(file)) from None
        assert isinstance(metadata, Metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what a table of contents is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == metadata_classes.__name__:
            found = getattr(metadata_classes, name, None)
            if isinstance(found, type):
                return found
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"holds {module}.{name}, which does not belong there")


_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
