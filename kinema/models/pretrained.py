"""Folders of pretrained text encoders: what must be in them, and their weights one at a time."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kinema.config.errors import KinemaError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of weights in the order of preference; in shards, `NAME.index.json` lists them."""
SAMPLES, SAMPLE_BYTES = 16, 64 << 10


@dataclass(frozen=True)
class PretrainedFolder:
    """A complete folder as model hubs have them: configuration, tokenizer, weights."""

    path: Path
    config: dict[str, Any]
    """What `config.json` says."""
    tokenizer: tuple[str, ...]
    """Names of the tokenizer's files."""
    weights: tuple[str, ...]
    """Names of the weights' files."""

    @classmethod
    def find(
        cls, path: Path | None, kind: str, *, tokenizers: tuple[tuple[str, ...], ...], example: str
    ) -> PretrainedFolder:
        """Look a folder over without reading its weights.

        Args:
            kind: what messages call the encoder: "T5".
            tokenizers: sets of files, any of which makes a tokenizer.
            example: a hub's name of such a folder.

        Raises:
            KinemaError: no folder, or one that is not complete; lists everything that is missing.
        """
        hint = f"the files of {example}, or of another {kind} text encoder, belong there"
        if path is None:
            raise KinemaError(
                f"the {kind} text encoder needs weights, and no folder of them is named",
                where="text_weights",
                hint=f"name a folder with the files of {example}, or use precomputed embeddings",
            )
        if not path.is_dir():
            what = "is no folder" if path.exists() else "this folder is missing"
            raise KinemaError(f"{what} ({kind} text encoder)", where=str(path), hint=hint)
        missing = [] if (path / "config.json").is_file() else ["config.json"]
        tokenizer = next(
            (names for names in tokenizers if all((path / n).is_file() for n in names)), None
        )
        if tokenizer is None:
            missing.append(" or ".join(" with ".join(names) for names in tokenizers))
        weights, absent = _weights(path)
        missing += absent
        if missing:
            raise KinemaError(
                f"is not a complete {kind} text encoder; missing: {', '.join(missing)}",
                where=str(path),
                hint=hint,
            )
        assert tokenizer is not None
        return cls(path, _json(path / "config.json"), tokenizer, weights)

    def fingerprint(self) -> str:
        """16 hex digits that tell these weights and this tokenizer from others.

        From names, sizes and 16 samples of 64 KiB of each file: gigabytes need not be read.
        """
        whole = hashlib.sha256()
        for name in sorted({"config.json", *self.tokenizer, *self.weights}):
            with (self.path / name).open("rb") as file:
                size = file.seek(0, 2)
                whole.update(f"{name} {size}\n".encode())
                last = max(0, size - SAMPLE_BYTES)
                for start in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
                    file.seek(start)
                    whole.update(file.read(SAMPLE_BYTES))
        return whole.hexdigest()[:16]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by name, on the CPU, of which one at a time is held in memory.

        They are views of the files: copy what is to stay. Nothing in the files is executed.

        Raises:
            KinemaError: a file that is damaged or holds anything but tensors.
        """
        for name in self.weights:
            file = self.path / name
            if file.suffix == ".safetensors":
                yield from _safetensors(file)
            else:
                yield from _pickled(file)


def _weights(path: Path) -> tuple[tuple[str, ...], list[str]]:
    """Names of the files, and of those that are missing."""
    for name in WEIGHTS:
        if (path / name).is_file():
            return (name,), []
        index = path / f"{name}.index.json"
        if index.is_file():
            table = _json(index).get("weight_map")
            if not isinstance(table, dict) or not table:
                raise KinemaError("lists no weights", where=str(index))
            shards = tuple(sorted({str(shard) for shard in table.values()}))
            for shard in shards:
                if Path(shard).name != shard:
                    raise KinemaError(f"names a file elsewhere: {shard!r}", where=str(index))
            return shards, [s for s in shards if not (path / s).is_file()]
    return (), [f"{WEIGHTS[0]} or {WEIGHTS[1]} (one file, or shards with their .index.json)"]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise KinemaError(f"is not readable: {error}", where=str(file)) from None
    if not isinstance(content, dict):
        raise KinemaError("is not a JSON object", where=str(file))
    return content


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise KinemaError(f"is damaged: {error}", where=str(file)) from None


def _pickled(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of PyTorch before 1.6 cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise KinemaError(
            "holds more than tensors, or is damaged; it is not read, as that could run its code",
            where=str(file),
            hint="use a safetensors file of the same weights",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KinemaError(f"is damaged: {reason}", where=str(file)) from None
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise KinemaError("is not a table of tensors", where=str(file))
    yield from content.items()


def return_freed_memory() -> None:
    """Give memory that was freed back to the system; glibc keeps blocks below 32 MiB otherwise,
    and a network's worth of them would stay. Elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def require_transformers(kind: str, *names: str) -> ModuleType:
    """The `transformers` package, with these classes of it imported.

    Raises:
        KinemaError: it is not installed.
    """
    try:
        with quiet_imports():
            import transformers

            for name in names:
                getattr(transformers, name)
    except ImportError as error:
        raise KinemaError(
            f"the {kind} text encoder needs {error.name}, which is not installed",
            where="text.type",
            hint="pip install 'kinema[pretrained]'",
        ) from None
    module: ModuleType = transformers
    return module


@contextmanager
def quiet_imports() -> Iterator[None]:
    """transformers imports torchao, which says on stderr which CUDA extensions it cannot load."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
