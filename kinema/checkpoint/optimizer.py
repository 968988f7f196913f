"""The optimizer section: a folder of PyTorch's distributed checkpoint, tensors only.

One process writes and reads it here without a process group; the format already lets many ranks
write their own parts and another number of ranks read them.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import metadata as metadata_classes
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from kinema.checkpoint.errors import CheckpointError


def write_optimizer(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a flat dict of tensors into a new folder, flushed to disk."""
    not_tensors = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    assert not not_tensors, f"numbers belong into state.json: {not_tensors[:3]}"
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True)
    failure: BaseException | None = None
    try:
        with _single_process():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        failure, _ = next(iter(error.failures.values()))
    if failure is not None:
        raise failure  # out here: inside the handler it would forget what it came from


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
        file = Path(self.path) / ".metadata"
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
