"""Text embeddings worked out once and kept beside the manifest.

A cache is a folder::

    cache.json                     format, encoder settings, weights, channels, shards, their sizes
    index.safetensors              for each row: shard, start and length in tokens, caption hash
    tokens-00000.safetensors ...   y [tokens of the shard, D], float16 or float32, and the lengths

Only real tokens are kept, one row's after the other's, so that any row is read without looking at
others. A cache is keyed by what made it, the encoder's settings and weights and every caption,
and refused for anything else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest, row_list

FORMAT = "kinema text cache 2"
Array = np.ndarray[Any, np.dtype[Any]]


class StaleCacheError(KinemaError):
    """A cache that was made of something else than what it is to be used for."""


def manifest_hashes(manifest: Manifest) -> Array:
    """64 bits of the hash of each row's caption: uint64 [N]."""
    batches = manifest.table.select(["text"]).to_batches(max_chunksize=65536)
    parts = [caption_hashes(batch.column(0).to_pylist()) for batch in batches]
    return np.concatenate([np.empty(0, "<u8"), *parts])


def caption_hashes(captions: Iterable[str]) -> Array:
    """64 bits of the hash of each caption: uint64 [N].

    White space at the ends does not count: no encoder reads it.
    """
    digests = (hashlib.blake2b(text.strip().encode(), digest_size=8).digest() for text in captions)
    return np.frombuffer(b"".join(digests), "<u8")


class TextCache:
    """Embeddings by row or by caption. Made by `open`; may be handed to other processes."""

    def __init__(self, path: Path, about: dict[str, Any], index: dict[str, Array]) -> None:
        self.path = path
        self.weights: str | None = about["weights"]
        self.dim: int = about["dim"]
        self.dtype = np.dtype(about["dtype"])
        self._files: list[str] = [shard["file"] for shard in about["shards"]]
        self._index = index
        self._slices: dict[int, Any] = {}
        self._row_of: dict[int, int] | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        manifest: Manifest | None,
        encoder: dict[str, Any],
        *,
        weights: str | None = None,
    ) -> TextCache:
        """Open a cache for `manifest` and for an encoder of these settings.

        Args:
            manifest: whose rows will be asked for; None: captions will be (`find`).
            weights: names the encoder's weights; None: not known here, and not compared.

        Raises:
            StaleCacheError: it was made with other settings, other weights or of other captions;
                says which.
            KinemaError: there is no complete cache.
        """
        path = Path(os.path.abspath(path))
        about = _read_about(path)
        differing = list(_differences(about["encoder"], encoder))
        if weights is not None:
            differing += _differences(about["weights"], weights, "weights")
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
        if manifest is not None:
            _check_captions(path, index["caption"], manifest)
        return cls(path, about, index)

    def __len__(self) -> int:
        return len(self._index["length"])

    def find(self, captions: Sequence[str]) -> Array:
        """Rows of some captions, whatever the cache was made of: int64 [n].

        Raises:
            KinemaError: captions that are not there; shows the first.
        """
        if self._row_of is None:
            # Backwards, so that the first row of a caption stays.
            hashes = self._index["caption"].tolist()
            self._row_of = {hashes[row]: row for row in range(len(hashes) - 1, -1, -1)}
        rows = [self._row_of.get(key, -1) for key in caption_hashes(captions).tolist()]
        absent = [text for text, row in zip(captions, rows, strict=True) if row < 0]
        if absent:
            raise KinemaError(
                f"has no embedding of {absent[0]!r}"
                + (f" and {len(absent) - 1} more captions" if absent[1:] else ""),
                where=str(self.path),
                hint="encode these very captions: kinema text encode RECIPE --prompt-path FILE",
            )
        return np.array(rows, np.int64)

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


def _check_captions(path: Path, cached: Array, manifest: Manifest) -> None:
    if len(cached) != len(manifest):
        raise _stale(path, f"it has {len(cached)} rows, {manifest.source} has {len(manifest)}")
    changed = np.flatnonzero(cached != manifest_hashes(manifest))
    if changed.size:
        raise _stale(
            path, f"{changed.size} captions of {manifest.source} differ: {row_list(changed)}"
        )


def _stale(path: Path, what: str) -> StaleCacheError:
    return StaleCacheError(
        f"does not fit: {what}", where=str(path), hint="encode the captions again"
    )


def _differences(cached: Any, wanted: Any, at: str = "") -> Iterator[str]:
    """`max_tokens is 64 in the cache, now 128`, for every value that differs."""
    if isinstance(cached, dict) and isinstance(wanted, dict):
        keys = cached.keys() | wanted.keys()
        if cached.get("type") != wanted.get("type"):
            keys = {"type"}  # another kind has other settings
        for key in sorted(keys):
            name = f"{at}.{key}" if at else key
            yield from _differences(cached.get(key), wanted.get(key), name)
    elif json.dumps(cached) != json.dumps(wanted):
        yield f"{at} is {json.dumps(cached)} in the cache, now {json.dumps(wanted)}"
