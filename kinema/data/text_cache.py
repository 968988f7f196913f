"""Text embeddings worked out once and kept beside the manifest.

A cache is a folder::

    cache.json                     format, encoder settings, channels, shards and their sizes
    index.safetensors              for each row: shard, start and length in tokens, caption hash
    tokens-00000.safetensors ...   y [tokens of the shard, D], float16 or float32

Only real tokens are kept, one row's after the other's, so that any row is read without looking at
others. A cache is keyed by what made it, the encoder's settings and every caption, and refused
for anything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest, row_list
from kinema.data.writing import writing
from kinema.media.write import atomic_output

FORMAT = "kinema text cache 1"
SHARD_BYTES = 256 << 20
DTYPES = ("float16", "float32")
_OWN_FILES = re.compile(r"cache\.json|index\.safetensors|tokens-\d+\.safetensors")
Array = np.ndarray[Any, np.dtype[Any]]


class StaleCacheError(KinemaError):
    """A cache that was made of something else than what it is to be used for."""


class TextCacheWriter:
    """Writes a cache; the folder appears when all rows are there.

    Used as a context. Leaving it completes the cache, an exception removes what was written::

        with TextCacheWriter(path, manifest, to_dict(config.text), dim=4096) as cache:
            for texts in batches:
                cache.append(y, mask)
    """

    def __init__(
        self,
        path: str | Path,
        manifest: Manifest,
        encoder: dict[str, Any],
        *,
        dim: int,
        dtype: str = "float16",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """
        Args:
            path: the folder to make; a cache that is there already is replaced at the end.
            manifest: whose captions are encoded, all rows of it.
            encoder: all settings that the embeddings depend on, as plain data (`to_dict`).
            dim: channels D of an embedding.
            dtype: `float16` or `float32`.
            shard_bytes: a file is closed when it has grown to this.

        Raises:
            KinemaError: another dtype; there is something else than a cache at `path`.
        """
        if dtype not in DTYPES:
            raise KinemaError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.path = Path(os.path.abspath(path))
        _check_replaceable(self.path)
        self.manifest = manifest
        self.encoder = encoder
        self.dim = dim
        self.dtype = np.dtype(dtype)
        self._shard_bytes = shard_bytes
        self._folder = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._rows = 0
        self._lengths: list[Array] = []
        self._shard_of: list[Array] = []
        self._starts: list[Array] = []
        self._open_shard: list[Array] = []
        self._open_tokens = 0
        self._shards: list[dict[str, Any]] = []

    def append(self, y: Array, mask: Array) -> None:
        """Add the next rows, in the manifest's order.

        Args:
            y: `[n, L, D]` embeddings.
            mask: `[n, L]` bool, True = a real token; tokens keep their order.

        Raises:
            KinemaError: another shape, or values that are not finite in the cache's dtype.
        """
        n = len(y)
        if y.ndim != 3 or y.shape[2] != self.dim or mask.shape != y.shape[:2]:
            raise KinemaError(
                f"embeddings {y.shape} with mask {mask.shape}, not [n, L, {self.dim}] and [n, L]"
            )
        with np.errstate(over="ignore"):  # said below, with the row
            tokens = y[mask.astype(bool)].astype(self.dtype)
        lengths = mask.astype(bool).sum(1, dtype=np.int64)
        starts = self._open_tokens + np.cumsum(lengths) - lengths
        finite = np.isfinite(tokens).all(1)
        if not finite.all():
            row = self._rows + int(np.repeat(np.arange(n), lengths)[~finite][0])
            raise KinemaError(f"the embedding of row {row} is not finite in {self.dtype}")
        self._lengths.append(lengths.astype(np.int32))
        self._starts.append(starts)
        self._shard_of.append(np.full(n, len(self._shards), np.int32))
        self._open_shard.append(tokens)
        self._open_tokens += len(tokens)
        self._rows += n
        if self._open_tokens * self.dim * self.dtype.itemsize >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        name = f"tokens-{len(self._shards):05d}.safetensors"
        tokens = np.concatenate([np.zeros((0, self.dim), self.dtype), *self._open_shard])
        self._save({"y": tokens}, name)
        size = (self._folder / name).stat().st_size
        self._shards.append({"file": name, "tokens": len(tokens), "bytes": size})
        self._open_shard, self._open_tokens = [], 0

    def _save(self, tensors: dict[str, Array], name: str) -> None:
        path = self._folder / name
        with writing(path), atomic_output(path) as temporary:
            temporary.write_bytes(save(tensors))

    def _complete(self) -> None:
        if self._rows != len(self.manifest):
            raise KinemaError(
                f"{self._rows} rows were encoded, the manifest has {len(self.manifest)}",
                where=str(self.path),
            )
        self._close_shard()
        index = {
            "shard": np.concatenate(self._shard_of),
            "start": np.concatenate(self._starts),
            "length": np.concatenate(self._lengths),
            "caption": _caption_hashes(self.manifest),
        }
        self._save(index, "index.safetensors")
        about = {
            "format": FORMAT,
            "encoder": self.encoder,
            "rows": self._rows,
            "dim": self.dim,
            "dtype": self.dtype.name,
            "shards": self._shards,
        }
        path = self._folder / "cache.json"
        with writing(path), atomic_output(path) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n")
        shutil.rmtree(self.path, ignore_errors=True)
        os.replace(self._folder, self.path)

    def __enter__(self) -> Self:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._complete()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


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


class TextCache:
    """Embeddings by manifest row. Made by `open`; may be handed to other processes."""

    def __init__(self, path: Path, about: dict[str, Any], index: dict[str, Array]) -> None:
        self.path = path
        self.dim: int = about["dim"]
        self.dtype = np.dtype(about["dtype"])
        self._files: list[str] = [shard["file"] for shard in about["shards"]]
        self._index = index
        self._slices: dict[int, Any] = {}

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest, encoder: dict[str, Any]) -> TextCache:
        """Open a cache for `manifest` and for an encoder of these settings.

        Raises:
            StaleCacheError: it was made with other settings or of other captions; says which.
            KinemaError: there is no complete cache.
        """
        path = Path(os.path.abspath(path))
        about = _read_about(path)
        differing = list(_differences(about["encoder"], encoder))
        if differing:
            raise _stale(path, f"the text encoder differs: {'; '.join(differing)}")
        for shard in about["shards"]:
            file = path / shard["file"]
            size = file.stat().st_size if file.is_file() else 0
            if size != shard["bytes"]:
                raise KinemaError(
                    f"has {size} bytes instead of {shard['bytes']}",
                    where=str(file),
                    hint="copy the cache again, or make it anew",
                )
        try:
            index = load_file(path / "index.safetensors")
        except (SafetensorError, OSError) as error:
            raise KinemaError(f"index is not readable: {error}", where=str(path)) from None
        if about["rows"] != len(manifest):
            raise _stale(
                path, f"it has {about['rows']} rows, {manifest.source} has {len(manifest)}"
            )
        changed = np.flatnonzero(index["caption"] != _caption_hashes(manifest))
        if changed.size:
            raise _stale(
                path, f"{changed.size} captions of {manifest.source} differ: {row_list(changed)}"
            )
        return cls(path, about, index)

    def __len__(self) -> int:
        return len(self._index["length"])

    def features(self, rows: Array | list[int]) -> tuple[Array, Array]:
        """Embeddings of some rows, padded with zeros to the longest of them.

        Returns:
            y `[n, L, D]` in the cache's dtype and mask `[n, L]` bool, True = a real token.
        """
        lengths = self._index["length"][rows]
        y = np.zeros((len(rows), max(1, int(lengths.max(initial=0))), self.dim), self.dtype)
        for i, row in enumerate(rows):
            start, length = int(self._index["start"][row]), int(lengths[i])
            if length:
                shard = self._shard(int(self._index["shard"][row]))
                y[i, :length] = shard[start : start + length]
        return y, np.arange(y.shape[1]) < lengths[:, None]

    def _shard(self, number: int) -> Any:
        if number not in self._slices:
            file = safe_open(self.path / self._files[number], framework="np")
            self._slices[number] = file.get_slice("y")
        return self._slices[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slices": {}}  # open files stay in their process


def _read_about(path: Path) -> dict[str, Any]:
    file = path / "cache.json"
    hint = "make the cache again"
    if not file.is_file():
        raise KinemaError("is not a text cache: it has no cache.json", where=str(path), hint=hint)
    try:
        about = json.loads(file.read_text())
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise KinemaError(f"is not of the format {FORMAT!r}", where=str(file), hint=hint)
    return about


def _stale(path: Path, what: str) -> StaleCacheError:
    return StaleCacheError(
        f"does not fit: {what}", where=str(path), hint="encode the captions again"
    )


def _differences(cached: Any, wanted: Any, at: str = "") -> Iterator[str]:
    """`max_tokens is 64 in the cache, now 128`, for every value that differs."""
    if isinstance(cached, dict) and isinstance(wanted, dict):
        for key in sorted(cached.keys() | wanted.keys()):
            name = f"{at}.{key}" if at else key
            yield from _differences(cached.get(key), wanted.get(key), name)
    elif json.dumps(cached) != json.dumps(wanted):
        yield f"{at} is {json.dumps(cached)} in the cache, now {json.dumps(wanted)}"


def _caption_hashes(manifest: Manifest) -> Array:
    """64 bits of each caption's hash: uint64 [N]."""
    hashes = np.empty(len(manifest), "<u8")
    row = 0
    for batch in manifest.table.select(["text"]).to_batches(max_chunksize=65536):
        for text in batch.column(0).to_pylist():
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            hashes[row] = int.from_bytes(digest, "little")
            row += 1
    return hashes
