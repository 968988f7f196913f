"""Writing a cache of text embeddings, in as many runs as it takes.

While it is written the folder is called `.NAME.partial`. Shards that are whole stay when the work
is interrupted, and the next run of the same work goes on after them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kinema.config.errors import KinemaError
from kinema.data.text_cache import FORMAT, Array
from kinema.data.writing import writing
from kinema.media.write import atomic_output

SHARD_BYTES = 256 << 20
DTYPES = ("float16", "float32")
_KEY = "partial.json"
_OWN_FILES = re.compile(r"cache\.json|index\.safetensors|tokens-\d+\.safetensors|partial\.json")


class TextCacheWriter:
    """Writes a cache; the folder appears when all rows are there.

    Used as a context. Leaving it completes the cache; an exception keeps the shards that are
    whole, and a writer of the same cache goes on after them::

        hashes = manifest_hashes(manifest)
        with TextCacheWriter(path, hashes, to_dict(config.text), dim=4096) as cache:
            for texts in batches_from(cache.rows):
                cache.append(y, mask)

    Attributes:
        rows: how many rows are there; inside the context.
    """

    def __init__(
        self,
        path: str | Path,
        captions: Array,
        encoder: dict[str, Any],
        *,
        dim: int,
        weights: str | None = None,
        dtype: str = "float16",
        shard_bytes: int | None = None,
    ) -> None:
        """
        Args:
            path: the folder to make; a cache that is there already is replaced at the end.
            captions: hashes of all captions, in the order of their rows.
            encoder: all settings that the embeddings depend on, as plain data (`to_dict`).
            dim: channels D of an embedding.
            weights: names the encoder's weights, where it has any (`TextEncoder.weights_id`).
            dtype: `float16` or `float32`.
            shard_bytes: a file is closed when it has grown to this; None: `SHARD_BYTES`.

        Raises:
            KinemaError: another dtype; there is something else than a cache at `path`.
        """
        if dtype not in DTYPES:
            raise KinemaError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.path = Path(os.path.abspath(path))
        _check_replaceable(self.path)
        self.rows = 0
        self._captions = captions
        self._about = {
            "format": FORMAT,
            "encoder": encoder,
            "weights": weights,
            "rows": len(captions),
            "dim": dim,
            "dtype": dtype,
        }
        self._key = self._about | {"captions": hashlib.sha256(captions.tobytes()).hexdigest()}
        self._dim = dim
        self._dtype = np.dtype(dtype)
        self._shard_bytes = SHARD_BYTES if shard_bytes is None else shard_bytes
        self._folder = self.path.with_name(f".{self.path.name}.partial")
        self._lock: int | None = None
        self._shard_lengths: list[Array] = []  # of whole shards: length of each row in tokens
        self._tokens: list[Array] = []  # of the open shard
        self._lengths: list[Array] = []

    def append(self, y: Array, mask: Array) -> None:
        """Add the next rows, in the captions' order.

        Args:
            y: `[n, L, D]` embeddings.
            mask: `[n, L]` bool, True = a real token; tokens keep their order.

        Raises:
            KinemaError: another shape, or values that are not finite in the cache's dtype.
        """
        if y.ndim != 3 or y.shape[2] != self._dim or mask.shape != y.shape[:2]:
            raise KinemaError(
                f"embeddings {y.shape} with mask {mask.shape}, not [n, L, {self._dim}] and [n, L]"
            )
        with np.errstate(over="ignore"):  # said below, with the row
            tokens = y[mask.astype(bool)].astype(self._dtype)
        lengths = mask.astype(bool).sum(1, dtype=np.int64)
        finite = np.isfinite(tokens).all(1)
        if not finite.all():
            row = self.rows + int(np.repeat(np.arange(len(y)), lengths)[~finite][0])
            raise KinemaError(f"the embedding of row {row} is not finite in {self._dtype}")
        self._lengths.append(lengths.astype(np.int32))
        self._tokens.append(tokens)
        self.rows += len(y)
        if sum(part.nbytes for part in self._tokens) >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        tokens = np.concatenate([np.zeros((0, self._dim), self._dtype), *self._tokens])
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        self._save({"y": tokens, "length": lengths}, _shard_name(len(self._shard_lengths)))
        self._shard_lengths.append(lengths)
        self._tokens, self._lengths = [], []

    def _save(self, tensors: dict[str, Array], name: str) -> None:
        path = self._folder / name
        with writing(path), atomic_output(path) as temporary:
            temporary.write_bytes(save(tensors))

    def _save_json(self, content: dict[str, Any], name: str) -> None:
        path = self._folder / name
        with writing(path), atomic_output(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")

    def _complete(self) -> None:
        if self.rows != len(self._captions):
            raise KinemaError(
                f"{self.rows} rows were encoded of {len(self._captions)}", where=str(self.path)
            )
        if self._lengths or not self._shard_lengths:
            self._close_shard()
        counts = [len(lengths) for lengths in self._shard_lengths]
        starts = [np.cumsum(n, dtype=np.int64) - n for n in self._shard_lengths]
        index: dict[str, Array] = {
            "shard": np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            "start": np.concatenate(starts),
            "length": np.concatenate(self._shard_lengths),
            "caption": self._captions,
        }
        self._save(index, "index.safetensors")
        shards = []
        for number, lengths in enumerate(self._shard_lengths):
            name = _shard_name(number)
            size = (self._folder / name).stat().st_size
            shards.append({"file": name, "tokens": int(lengths.sum()), "bytes": size})
        self._save_json(self._about | {"shards": shards}, "cache.json")
        old = self.path.with_name(f".{self.path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(self._folder, self.path)
        shutil.rmtree(old, ignore_errors=True)
        (self.path / _KEY).unlink()

    def _resume(self) -> None:
        """Take over the whole shards of an earlier run of the same cache; remove all else."""
        try:
            same = json.loads((self._folder / _KEY).read_text()) == self._key
        except (OSError, ValueError):
            same = False
        if same:
            while (found := _read_lengths(self._folder, len(self._shard_lengths))) is not None:
                self._shard_lengths.append(found)
                self.rows += len(found)
        keep = {_KEY, *(_shard_name(n) for n in range(len(self._shard_lengths)))} if same else set()
        for name in os.listdir(self._folder):
            if name not in keep:
                (self._folder / name).unlink()
        if not same:
            self._save_json(self._key, _KEY)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise KinemaError(
                "another process is writing this cache", where=str(self.path)
            ) from None
        self._resume()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._lock is not None
        try:
            if kind is None:
                self._complete()
        finally:
            os.close(self._lock)


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.safetensors"


def _read_lengths(folder: Path, shard: int) -> Array | None:
    """Lengths of the rows in a shard; None if there is no such file, or not a whole one."""
    try:
        with safe_open(folder / _shard_name(shard), framework="np") as file:
            lengths: Array = file.get_tensor("length")
    except (OSError, SafetensorError):
        return None
    return lengths


def _check_replaceable(path: Path) -> None:
    """Refuse to take the place of anything but a cache: replacing it removes what is there."""
    if not os.path.lexists(path):
        return
    hint = "name a folder that is not there yet"
    if path.is_symlink() or not path.is_dir():
        raise KinemaError("is there already, and no folder", where=str(path), hint=hint)
    for name in sorted(os.listdir(path)):
        if not _OWN_FILES.fullmatch(name):
            raise KinemaError(
                f"is there already and holds {name!r}, which is no part of a text cache",
                where=str(path),
                hint=hint,
            )
