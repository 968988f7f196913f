"""Reading and writing `.safetensors` tensor by tensor, through ordinary reads and writes.

The format: 8 bytes length of the header (little-endian), the header (JSON: name to dtype, shape and
byte range; text under `__metadata__`), the bytes of all tensors. Own code, because reading a file
through a memory map counts every page twice while it is copied, and fails with a signal when the
file changes below it; and because writing can hash as it goes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinema.checkpoint.disk import BLOCK, FileRecord
from kinema.checkpoint.errors import WeightsError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""


class SafetensorsFile:
    """An open file, its header checked.

    Attributes:
        shapes: shape of every tensor by name.
        dtypes: its dtype.

    Raises:
        WeightsError: not a safetensors file, or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self._entries = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self.shapes = {name: torch.Size(e["shape"]) for name, e in self._entries.items()}
        self.dtypes = {name: DTYPES[e["dtype"]] for name, e in self._entries.items()}

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own, on the CPU."""
        entry = self._entries[name]
        return self._read(name, entry["shape"], entry["data_offsets"][0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (along the first axis) of one tensor; nothing else is read."""
        entry = self._entries[name]
        rows, *rest = entry["shape"]
        assert 0 <= start <= stop <= rows
        row = math.prod(rest) * DTYPES[entry["dtype"]].itemsize
        return self._read(name, [stop - start, *rest], entry["data_offsets"][0] + start * row)

    def _read(self, name: str, shape: list[int], begin: int) -> Tensor:
        tensor = torch.empty(shape, dtype=DTYPES[self._entries[name]["dtype"]])
        self._file.seek(self._start + begin)
        view = memoryview(_bytes(tensor))
        while len(view):
            count = self._file.readinto(view)
            if not count:
                raise self._error("was cut off while it was read")
            view = view[count:]
        return tensor

    def _read_header(self) -> dict[str, dict[str, Any]]:
        size = self.path.stat().st_size
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER + 1
        if length > MAX_HEADER:
            raise self._error("is not a safetensors file, or is cut off")
        self._start = 8 + length
        try:
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                self._check(name, entry)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, WeightsError):
                raise
            raise self._error(f"has a broken header or is cut off ({error})") from None
        stop = self._start + max((e["data_offsets"][1] for e in header.values()), default=0)
        if stop != size:
            raise self._error(f"has {size} bytes where its header speaks of {stop}: half copied?")
        assert isinstance(header, dict)
        return header

    def _check(self, name: str, entry: dict[str, Any]) -> None:
        begin, end = entry["data_offsets"]
        if not all(type(n) is int for n in (begin, end, *entry["shape"])):
            raise TypeError(f"{name} has sizes that are no whole numbers")
        if entry["dtype"] not in DTYPES:
            raise self._error(f"holds {name} as {entry['dtype']}, which is not known here")
        expected = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if min(begin, *entry["shape"], 0) < 0 or end - begin != expected:
            raise self._error(f"says that {name} {entry['shape']} has {end - begin} bytes")

    def _error(self, what: str) -> WeightsError:
        return WeightsError(what, where=str(self.path), hint="copy or download the file again")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> FileRecord:
    """Write a new file, hashing on the way; equal tensors give an equal file.

    Tensors may be on any device; they pass through memory one at a time. Not atomic by itself.

    Args:
        read: gives the values of a tensor when its turn comes; those of `tensors` may then be on
            the meta device.
    """
    # Wide elements first: with the header padded to 8 bytes, every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file, ThreadPoolExecutor(1) as hasher:
        values = read or tensors.__getitem__
        for block in _blocks(struct.pack("<Q", len(text)) + text, values, order):
            hashing = hasher.submit(digest.update, block)  # both let go of the interpreter's lock
            file.write(block)
            size += len(block)
            hashing.result()
    return FileRecord(size, digest.hexdigest())


def _blocks(
    header: bytes, read: Callable[[str], Tensor], order: list[str]
) -> Iterator[bytes | memoryview]:
    yield header
    for name in order:
        view = memoryview(_bytes(read(name).detach().cpu().contiguous()))
        for start in range(0, len(view), BLOCK):
            yield view[start : start + BLOCK]


def _bytes(tensor: Tensor) -> Any:
    """A NumPy view of the bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy()
