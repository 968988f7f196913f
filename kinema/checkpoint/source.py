"""Files of weights: found under their usual names, opened one after the other."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kinema.checkpoint.errors import WeightsError
from kinema.checkpoint.safetensors_file import SafetensorsFile

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
FOLDER_NAMES = (
    "{section}.safetensors",
    "{section}.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "{section}/pytorch_model.bin.index.json",
    "{section}/model.safetensors.index.json",
)
"""What is looked for in a folder, in this order; the last two are how Open-Sora saves training."""
WRAPPERS = ("state_dict", "ema", "model", "module")
"""Keys under which training programs store the tensors, in the order of preference."""


class TensorFile(Protocol):
    """One open file of tensors."""

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor: ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor: ...


class TorchFile:
    """A file of `torch.save` with nothing but tensors in it; never runs what it contains.

    Raises:
        WeightsError: cut off, or holds other objects.
    """

    def __init__(self, path: Path) -> None:
        data = _load_torch(path)
        self._tensors = {str(name): t for name, t in data.items() if isinstance(t, Tensor)}
        self.shapes = {name: t.shape for name, t in self._tensors.items()}
        self.dtypes = {name: t.dtype for name, t in self._tensors.items()}

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()  # out of the memory map, which ends with this object

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name][start:stop].clone()


def open_tensors(path: Path) -> AbstractContextManager[TensorFile]:
    """Open one file by its ending."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


class TensorSource:
    """All tensors of a weights file or folder, whichever of its files each lies in.

    Attributes:
        shapes: shape of every tensor by name.
        dtypes: its dtype.

    Raises:
        WeightsError: nothing there, cut off, or a tensor in two shards.
    """

    def __init__(self, path: Path, section: str = "model") -> None:
        self.path = path
        self.files = find_files(path, section)
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._of: dict[str, TensorFile] = {}
        with ExitStack() as opened:
            for file in self.files:
                tensors = opened.enter_context(open_tensors(file))
                twice = next((n for n in tensors.shapes if n in self.shapes), None)
                if twice is not None:
                    raise WeightsError(f"{twice} is in an earlier shard as well", where=str(file))
                self.shapes |= tensors.shapes
                self.dtypes |= tensors.dtypes
                self._of |= dict.fromkeys(tensors.shapes, tensors)
            self._opened = opened.pop_all()

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own, on the CPU."""
        return self._of[name].read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (along the first axis) of one tensor, as `read`."""
        return self._of[name].read_rows(name, start, stop)


def find_files(path: Path, section: str = "model") -> list[Path]:
    """The files that hold the weights `path` speaks of, all there.

    Args:
        path: a file, the index of a sharded one, or a folder.
        section: which weights of a folder: `model` or `ema`.

    Raises:
        WeightsError: nothing there, an unknown ending, or shards missing.
    """
    if path.is_dir():
        names = [n.format(section=section) for n in FOLDER_NAMES]
        found = [path / n for n in names if (path / n).is_file()]
        if not found:
            raise WeightsError(
                "the folder holds no weights under a known name",
                where=str(path),
                hint=f"one of {', '.join(names)}; or give the file itself",
            )
        path = found[0]
    if not path.is_file():
        raise WeightsError("no such file or folder", where=str(path))
    if path.name.endswith(".index.json"):
        return _shards(path)
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise WeightsError(
            f"{path.suffix or 'no'} ending: not a known kind of weights file",
            where=str(path),
            hint=f".safetensors, .index.json, {', '.join(TORCH_SUFFIXES)}, or a folder",
        )
    return [path]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        outside = [n for n in names if Path(n).name != n]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"is not an index of shards ({error})", where=str(index)) from None
    if outside:
        raise WeightsError(f"names a file outside its folder: {outside[0]!r}", where=str(index))
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise WeightsError(
            f"{len(missing)} of {len(names)} shards are missing: {', '.join(missing[:3])}",
            where=str(index),
            hint="copy or download the folder again",
        )
    return [index.parent / n for n in names]


def _load_torch(path: Path) -> dict[str, Any]:
    try:
        try:
            # Training programs keep their command line beside the tensors (Latte's files do): a
            # Namespace is a bag of values and runs nothing when it is loaded.
            with torch.serialization.safe_globals([argparse.Namespace]):
                data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # The format before PyTorch 1.6.
            with torch.serialization.safe_globals([argparse.Namespace]):
                data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))  # what it wanted to call
        if code is None:
            raise WeightsError(
                "is cut off, not a PyTorch file, or holds more than tensors", where=str(path)
            ) from None
        raise WeightsError(
            f"holds more than tensors, which could run code when loaded: refused ({code[1]})",
            where=str(path),
            hint="convert it to .safetensors with the program that made it",
        ) from None
    except KeyError:  # an unknown instruction: its number says nothing
        raise WeightsError("is cut off or not a PyTorch file", where=str(path)) from None
    except (RuntimeError, EOFError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"is cut off or not a PyTorch file ({first})", where=str(path)) from None
    for key in WRAPPERS:
        if isinstance(data, dict) and not any(isinstance(v, Tensor) for v in data.values()):
            data = data.get(key, data)
    if not isinstance(data, dict) or not any(isinstance(v, Tensor) for v in data.values()):
        raise WeightsError("holds no named tensors", where=str(path))
    return data
