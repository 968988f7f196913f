"""Writing a cache of latents, in as many runs and processes as it takes.

Every file appears under its name when it is whole, and says which clips it holds; what is there is
not made again. `finish` puts the index beside them and `cache.json` last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from kinema.config.errors import KinemaError
from kinema.data.latent_cache import FORMAT, INDEX, Latents, folder_name
from kinema.data.writing import writing
from kinema.media.write import atomic_output

DTYPES = ("float16", "float32")
KEY = "made_from.json"


@dataclass(frozen=True)
class Clip:
    """What is to be encoded of one row at one size."""

    row: int
    frames: int
    """At the cache's frame interval, from the first."""
    height: int
    width: int


class LatentCacheWriter:
    """Files of one cache.

    Args:
        path: the folder, made when it is not there.
        made_from: everything that the latents depend on, as JSON values: videos, vae, weights,
            frame_interval, transform, chunks.
        dtype: `float16` or `float32`.

    Raises:
        KinemaError: the folder holds a cache of something else, or cannot be written.
    """

    def __init__(
        self, path: str | Path, made_from: Mapping[str, Any], *, dtype: str = "float16"
    ) -> None:
        if dtype not in DTYPES:
            raise KinemaError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self.path = Path(os.path.abspath(path))
        self.made_from = {**made_from, "dtype": dtype}
        self._dtype = np.dtype(dtype)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            # Another process of the same work may be about to write the key.
            begun = f".{Path(KEY).stem}."
            others = [p.name for p in self.path.iterdir() if not p.name.startswith(begun)]
        key = self.path / KEY
        if key.is_file():
            if json.loads(key.read_text(encoding="utf-8")) != self.made_from:
                raise KinemaError(
                    "holds latents of other videos, of another autoencoder or of other settings",
                    where=str(self.path),
                    hint="write into another folder, or delete this one",
                )
        elif others:
            raise KinemaError(
                f"is not empty and no latent cache (it holds {min(others)!r})",
                where=str(self.path),
                hint="name a folder that is not there yet",
            )
        else:
            with writing(key), atomic_output(key) as temporary:
                Path(temporary).write_text(json.dumps(self.made_from, indent=1), encoding="utf-8")

    def there(self, height: int, width: int) -> dict[int, int]:
        """Row: frames, of the clips that files have already."""
        files = _files(self.path / folder_name(height, width))
        return {row: int(values[0]) for row, (_, values) in _longest(files).items()}

    def write(
        self,
        clips: Sequence[Clip],
        latents: Sequence[Latents],
        fps: Sequence[float],
        original: Sequence[tuple[int, int]],
    ) -> Path:
        """Write clips of one size into a file of their own.

        Args:
            latents: normalised mean and standard deviation of each.
            fps: of each clip's file; nan for images.
            original: height and width of each clip's file.

        Raises:
            KinemaError: the disk is full, or the folder cannot be written.
        """
        first = clips[0]
        folder = self.path / folder_name(first.height, first.width)
        file = folder / f"{first.row:09}-{len(clips):04}.safetensors"
        again = 1
        while file.exists():  # has other clips as well: these are longer ones than it has
            again += 1
            file = file.with_name(f"{first.row:09}-{len(clips):04}-{again}.safetensors")
        tensors: dict[str, NDArray[Any]] = {}
        contents: dict[str, list[float | None]] = {}
        for clip, (mean, std), rate, size in zip(clips, latents, fps, original, strict=True):
            assert (clip.height, clip.width) == (first.height, first.width)
            # In C order: safetensors writes the bytes as they lie in memory.
            tensors[f"{clip.row}.mean"] = np.ascontiguousarray(mean, self._dtype)
            tensors[f"{clip.row}.std"] = np.ascontiguousarray(std, self._dtype)
            known = float(rate) if np.isfinite(rate) else None
            contents[str(clip.row)] = [clip.frames, known, *size]
        with writing(file):
            folder.mkdir(exist_ok=True)
            with atomic_output(file) as temporary:
                Path(temporary).write_bytes(save(tensors, {"clips": json.dumps(contents)}))
        return file

    def finish(self, rows: int) -> dict[tuple[int, int], int]:
        """Complete the cache. Call in one process when all have written.

        Args:
            rows: of the manifest.

        Returns:
            Height and width: number of clips.

        Raises:
            KinemaError: nothing was written, or the disk is full.
        """
        folders: dict[str, dict[str, int]] = {}
        counts: dict[tuple[int, int], int] = {}
        digest = hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode())
        for folder in sorted(self.path.glob("latent_*x*")):
            files = _files(folder)
            if not files:
                continue
            found = _longest(files)
            order = sorted(found)
            values = np.array([found[row][1] for row in order], dtype=np.float64)
            index = {
                "row": np.array(order, dtype=np.int64),
                "file": np.array([found[row][0] for row in order], dtype=np.int64),
                "frames": values[:, 0].astype(np.int64),
                "fps": values[:, 1],
                "height": values[:, 2].astype(np.int64),
                "width": values[:, 3].astype(np.int64),
            }
            digest.update(folder.name.encode() + index["row"].tobytes() + index["frames"].tobytes())
            with writing(folder), atomic_output(folder / INDEX) as temporary:
                Path(temporary).write_bytes(save(index))
            folders[folder.name] = {p.name: p.stat().st_size for p in [*files, folder / INDEX]}
            height, width = (int(n) for n in folder.name.removeprefix("latent_").split("x"))
            counts[height, width] = len(order)
        if not folders:
            raise KinemaError("no latents were written: every clip failed", where=str(self.path))
        about = {
            "format": FORMAT,
            "id": digest.hexdigest()[:32],
            "made_from": self.made_from,
            "rows": rows,
            "folders": folders,
        }
        file = self.path / "cache.json"
        with writing(file), atomic_output(file) as temporary:
            Path(temporary).write_text(json.dumps(about, indent=1), encoding="utf-8")
        return counts


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*-*.safetensors") if not p.name.startswith("."))


def _longest(files: Sequence[Path]) -> dict[int, tuple[int, list[float]]]:
    """Row: which of the files has most frames of it, and what `_contents` says there."""
    found: dict[int, tuple[int, list[float]]] = {}
    for number, file in enumerate(files):
        for row, values in _contents(file).items():
            if row not in found or values[0] > found[row][1][0]:
                found[row] = number, values
    return found


def _contents(file: Path) -> dict[int, list[float]]:
    """Row: frames, fps, original height and width, of the clips in a file."""
    try:
        with safe_open(file, framework="np") as opened:
            clips = json.loads(opened.metadata()["clips"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise KinemaError(
            f"is damaged: {error}", where=str(file), hint="delete it and encode again"
        ) from None
    return {
        int(row): [float("nan") if v is None else float(v) for v in values]
        for row, values in clips.items()
    }
