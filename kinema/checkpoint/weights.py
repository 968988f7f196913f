"""Weights in and out of a module: strict, streamed, with every tensor accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kinema.checkpoint.disk import FileRecord, full_disk_explained, replacing, write_text
from kinema.checkpoint.errors import WeightsError
from kinema.checkpoint.known import recognise
from kinema.checkpoint.layout import Layout, Stored, detect, match
from kinema.checkpoint.released_names import layouts
from kinema.checkpoint.safetensors_file import write_safetensors
from kinema.checkpoint.shards import copy_piece, read_into
from kinema.checkpoint.source import TensorSource

SHOWN = 5
"""Names shown of a list in a message."""
MAX_SHARD_BYTES = 8 * 2**30
Initial = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Initial values of some tensors of a network, by name."""


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor; `str()` is one line for the log."""

    source: str
    loaded: tuple[str, ...]
    new: tuple[str, ...]
    """In the module, not in the file: keep their initial values (declared by `allow_new`)."""
    unexpected: tuple[str, ...]
    """In the file, not in the module: left out (declared by `allow_unexpected`)."""
    loaded_parameters: int
    new_parameters: int
    unexpected_parameters: int

    def __str__(self) -> str:
        return (
            f"{self.source}: loaded {_count(self.loaded, self.loaded_parameters)}, "
            f"new {_count(self.new, self.new_parameters)}, "
            f"unexpected {_count(self.unexpected, self.unexpected_parameters)}"
        )


def load_weights(
    module: nn.Module,
    path: str | Path,
    *,
    allow_new: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    rename: Callable[[str], str] | None = None,
    device: torch.device | str | None = None,
    section: str = "model",
    leave: Collection[str] = (),
    initial: Initial | None = None,
) -> LoadReport:
    """Fill `module` from a file or folder of weights, one tensor at a time.

    A module on the meta device gets its tensors as they are read (build it there: no memory, no
    random initialisation); a module with memory is copied into, and of one that is sharded over
    ranks each reads its own rows. The dtype of each tensor stays the
    module's. Everything is checked before the first tensor is touched.

    Args:
        path: a `.safetensors` file, its `.index.json`, a `.pth`/`.pt`/`.bin` file of tensors, or a
            folder that holds weights under one of the usual names.
        allow_new: regular expressions (whole name) of tensors that the file may lack.
        allow_unexpected: regular expressions of tensors in the file that the module may lack.
        rename: from a name in the file to the name in the module.
        device: where tensors put into a meta module go. None: the CPU.
        section: which weights of a folder: `model` or `ema`.
        leave: tensors of the module that are checked but stay as they are (on the meta device:
            somebody reads them later, with a `TensorReader`).
        initial: the initial values of tensors that the file lacks, for a module on the meta device,
            which has none; asked once, and only for those.

    Raises:
        WeightsError: a missing or unreadable file; names, shapes or kinds of number that do
            not match (counts, the first few, and which known model the file looks like).
    """
    source = Path(path)
    rename = rename or (lambda name: name)
    with TensorSource(source, section) as tensors:
        ours = [rename(name) for name in tensors.shapes]
        if len(set(ours)) != len(ours):
            raise WeightsError("several tensors are renamed to the same name", where=str(source))
        layout = Layout(
            "renamed", {n: Stored((name,)) for n, name in zip(ours, tensors.shapes, strict=True)}
        )
        return fill(
            module,
            tensors,
            layout,
            allow_new=allow_new,
            allow_unexpected=allow_unexpected,
            device=device,
            leave=leave,
            initial=initial,
        )


def load_released(
    module: nn.Module,
    path: str | Path,
    *,
    allow_new: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    device: torch.device | str | None = None,
    section: str = "model",
    leave: Collection[str] = (),
    initial: Initial | None = None,
) -> LoadReport:
    """Fill `module` from a file or folder in any form that its weights are published in.

    Those are our own names, which are the released ones; the files of the first authors (Meta's
    DiT, Latte, PixArt: patch embeddings without an axis of time, position tables that are computed
    here); Stable Diffusion's autoencoders with names of any age; diffusers' layout. Names may have
    `module.` in front. Otherwise as strict as `load_weights`.

    Args:
        module: on the meta device, or with memory; one of Kinema's networks.
        path, allow_new, allow_unexpected, device, section, leave, initial: as for
            `load_weights`.

    Raises:
        WeightsError: as `load_weights`.
    """
    with TensorSource(Path(path), section) as tensors:
        layout = detect(tensors.shapes, layouts(module))
        return fill(
            module,
            tensors,
            layout,
            allow_new=allow_new,
            allow_unexpected=(*layout.computed, *allow_unexpected),
            device=device,
            leave=leave,
            initial=initial,
        )


def fill(
    module: nn.Module,
    tensors: TensorSource,
    layout: Layout,
    *,
    allow_new: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    device: torch.device | str | None = None,
    leave: Collection[str] = (),
    initial: Initial | None = None,
) -> LoadReport:
    """Check everything, then fill the module tensor by tensor from a file of that layout.

    Arguments and errors as for `load_weights`.
    """
    report = check_fit(
        module, tensors, layout, allow_new=allow_new, allow_unexpected=allow_unexpected
    )
    slots = _slots(module)
    left = set(leave)
    empty = [n for n in report.new if n not in left and slots[n].tensor.is_meta]
    _require_memory(module, [] if initial else empty, slots)
    values = initial(empty) if initial and empty else {}
    for name in values:
        slots[name].fill(values[name], device)
    for name in (n for n in report.loaded if n not in left):
        slot, stored = slots[name], layout.stored[name]
        if slot.tensor.is_meta:
            slot.fill(stored.read(tensors.read, slot.shape), device)
        else:
            read_into(slot.tensor, tensors, stored)
    return report


def check_fit(
    module: nn.Module,
    tensors: TensorSource,
    layout: Layout,
    *,
    allow_new: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> LoadReport:
    """What `fill` would do, without reading a tensor; the module may be on the meta device.

    Arguments and errors as for `load_weights`.
    """
    state = module.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    fit = match(tensors.shapes, layout, shapes, tensors.dtypes, dtypes)
    problems = [
        _problem("missing from the file", _undeclared(fit.missing, allow_new)),
        _problem("unknown to the model", _undeclared(fit.unexpected, allow_unexpected)),
        _problem("of another shape", fit.wrong_shape),
        _problem("of another kind of number", fit.wrong_kind),
    ]
    if any(problems):
        looks_like = recognise(tensors.shapes)
        raise WeightsError(
            f"these weights do not fit {type(module).__name__}: "
            + "; ".join(p for p in problems if p),
            where=str(tensors.path),
            hint=f"the file looks like {looks_like}" if looks_like else None,
        )
    return LoadReport(
        source=str(tensors.path),
        loaded=fit.loaded,
        new=fit.missing,
        unexpected=fit.unexpected,
        loaded_parameters=sum(shapes[n].numel() for n in fit.loaded),
        new_parameters=sum(shapes[n].numel() for n in fit.missing),
        unexpected_parameters=fit.unexpected_numbers,
    )


def iterate_tensors(path: str | Path, *, section: str = "model") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a weights file or folder by name, on the CPU, one at a time.

    Raises:
        WeightsError: as for `load_weights`.
    """
    with TensorSource(Path(path), section) as tensors:
        for name in tensors.shapes:
            yield name, tensors.read(name)


def save_weights(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    read: Callable[[str], Tensor] | None = None,
) -> dict[str, FileRecord]:
    """Write tensors as safetensors, whole or not at all: temporary name, fsync, rename.

    More than `max_shard_bytes` become `NAME-00001-of-00003.safetensors` and so on, with
    `NAME.safetensors.index.json` written last.

    Args:
        read: gives the values of a tensor when its turn comes; `state` may then be on the meta
            device, and one tensor at a time is in memory.

    Returns:
        Size and hash of every file by its name.

    Raises:
        CheckpointError: the disk is full; an earlier file of that name is untouched.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError("weights are written as .safetensors", where=str(path))
    with full_disk_explained(path):
        return write_weights(
            path, state, metadata=metadata, max_shard_bytes=max_shard_bytes, read=read
        )


def write_weights(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    read: Callable[[str], Tensor] | None = None,
) -> dict[str, FileRecord]:
    """`save_weights` for a caller that explains a full disk itself."""
    shards = _split(state, max_shard_bytes)
    records: dict[str, FileRecord] = {}
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = path.name
        if len(shards) > 1:
            name = f"{path.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        with replacing(path.with_name(name)) as temporary:
            part = {n: state[n] for n in names}
            records[name] = write_safetensors(temporary, part, metadata, read)
        index.update(dict.fromkeys(names, name))
    if len(shards) > 1:
        total = sum(t.nbytes for t in state.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        name = f"{path.name}.index.json"
        records[name] = write_text(path.with_name(name), text)
        path.unlink(missing_ok=True)  # an unsharded file of before would be read first
    return records


class _Slot:
    """One parameter or buffer of a module."""

    def __init__(self, owner: nn.Module, leaf: str, tensor: Tensor) -> None:
        self.owner, self.leaf, self.tensor = owner, leaf, tensor
        self.shape, self.dtype = tensor.shape, tensor.dtype

    @torch.no_grad()
    def fill(self, value: Tensor, device: torch.device | str | None) -> None:
        old = self.tensor
        if isinstance(old, DTensor):
            assert not old.is_meta, "a sharded model has memory before it is filled"
            copy_piece(old, value)
            return
        if not old.is_meta:
            old.copy_(value)
            return
        value = value.to(device=device or "cpu", dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(self.owner, self.leaf, value)
        self.tensor = value


def _slots(module: nn.Module) -> dict[str, _Slot]:
    slots = {}
    owners = dict(module.named_modules(remove_duplicate=False))
    for name, tensor in module.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        slots[name] = _Slot(owners[owner], leaf, tensor)
    return slots


def _require_memory(module: nn.Module, empty: list[str], slots: dict[str, _Slot]) -> None:
    """A meta module has no initial values that tensors not in the file could keep."""
    empty = empty + [n for n, b in module.named_buffers() if b.is_meta and n not in slots]
    assert not empty, f"stay without memory: {empty[:SHOWN]}; build the module on a real device"


def _undeclared(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [n for n in names if not is_declared(n, patterns)]


def is_declared(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the regular expressions matches the whole name.

    Raises:
        WeightsError: one that is no regular expression.
    """
    for pattern in patterns:
        try:
            if re.fullmatch(pattern, name):
                return True
        except re.error as error:
            raise WeightsError(
                f"{pattern!r} is no regular expression: {error}",
                hint=r"all of a block: blocks\.0\..*",
            ) from None
    return False


def _problem(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} tensors {what} ({', '.join(names[:SHOWN])}{more})"


def _count(names: tuple[str, ...], parameters: int) -> str:
    return f"{len(names)} tensors ({parameters:,} numbers)" if names else "0"


def _split(state: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards
