"""Latents of clips worked out once and kept beside the manifest.

A cache is a folder::

    cache.json                          what made it, and the files that belong to it
    latent_256x256/                     HEIGHTxWIDTH of the videos, in pixels
        index.safetensors               for each clip: row, file, frames, fps, original size
        000000000-0064.safetensors ...  ROW.mean and ROW.std, [C, t, h, w], normalised

Mean and standard deviation are those of the posterior, so that training draws anew at each step, as
it does when it encodes. A cache is keyed by the videos of the manifest, how frames are taken from
them, and the autoencoder, and refused for anything else.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from kinema.config.errors import KinemaError
from kinema.data.buckets import Bucket
from kinema.data.text_cache import StaleCacheError
from kinema.media.errors import MediaError

FORMAT = "kinema latent cache 1"
INDEX = "index.safetensors"
OPEN_FILES = 256
"""Files of a cache that a process keeps open; each is mapped, not read."""

Latents = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Mean and standard deviation, `[C, t, h, w]`."""


class Videos(Protocol):
    """What is read of a manifest."""

    @property
    def video_fingerprint(self) -> str: ...
    @property
    def source(self) -> str: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Chunks:
    """How an autoencoder cuts a video: which windows of cached latents are what encoding the
    window itself would give."""

    frames: int | None
    """Frames that are encoded by themselves; None: a video as a whole, and no window of it."""
    latents: int
    """Latent frames of such a run."""

    def whole(self, num_frames: int) -> bool:
        """Whether windows of so many frames can be cut out of longer latents."""
        return self.frames is not None and num_frames % self.frames == 0

    def to_latents(self, num_frames: int) -> int:
        """Latent frames of a run of whole chunks."""
        assert self.frames is not None
        return num_frames // self.frames * self.latents


@dataclass(frozen=True)
class Size:
    """The clips of one folder."""

    height: int
    width: int
    place: dict[int, int]
    """Row of the manifest: position in the arrays that follow."""
    rows: NDArray[np.int64]
    file: NDArray[np.int64]
    frames: NDArray[np.int64]
    """Frames of the video that the latents are of, counted at the cache's frame interval."""
    names: tuple[str, ...]
    """Of the files."""


class LatentCache:
    """Latents by row and size. Made by `open`."""

    def __init__(self, path: Path, about: dict[str, Any], sizes: dict[tuple[int, int], Size]):
        self.path = path
        self.frame_interval: int = about["made_from"]["frame_interval"]
        self.chunks = Chunks(**about["made_from"]["chunks"])
        self.weights: str | None = about["made_from"]["weights"]
        """Names the weights of the autoencoder; None: not known, as of imported latents."""
        self.id: str = about["id"]
        """Names what it was made of and which clips it has."""
        self._rows: int = about["rows"]
        self._sizes = sizes
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def open(
        cls,
        path: str | Path,
        videos: Videos,
        *,
        vae: dict[str, Any],
        frame_interval: int,
        transform: str,
    ) -> LatentCache:
        """Open a cache for the clips of a manifest.

        Args:
            vae: the autoencoder's settings, as plain data, without those of memory.
            frame_interval: every how many-th frame is used.
            transform: how frames are brought to size.

        Raises:
            StaleCacheError: it was made of other videos, or otherwise; says what differs.
            KinemaError: there is no complete cache.
        """
        path = Path(os.path.abspath(path))
        about = read_about(path)
        made = about["made_from"]
        wanted = {
            "videos": videos.video_fingerprint,
            "vae": vae,
            "frame_interval": frame_interval,
            "transform": transform,
        }
        differing = [line for key in wanted for line in _differences(made[key], wanted[key], key)]
        if differing:
            raise StaleCacheError(
                f"does not fit: {'; '.join(differing)}",
                where=str(path),
                hint="encode again: kinema latents encode; or name the cache of these settings",
            )
        sizes = {}
        for name, files in about["folders"].items():
            height, width = (int(n) for n in name.removeprefix("latent_").split("x"))
            sizes[height, width] = _read_size(path / name, height, width, files)
        return cls(path, about, sizes)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels."""
        return list(self._sizes)

    def frames_at(self, height: int, width: int) -> NDArray[np.int32]:
        """[N] frames cached of every row of the manifest at a size; 0: none."""
        found = np.zeros(self._rows, dtype=np.int32)
        size = self._sizes.get((height, width))
        if size is not None:
            found[size.rows] = size.frames
        return found

    def fits(self, cached: NDArray[np.int32], frames: int) -> NDArray[np.bool_]:
        """Whether a window of so many frames can be had of clips with so many cached."""
        if frames == 1 or not self.chunks.whole(frames):
            return cached == frames
        return cached >= frames

    def start(self, row: int, bucket: Bucket, unit: float) -> int:
        """Where a window of a bucket's length starts, in frames at the cache's interval.

        Args:
            unit: a uniform number in [0, 1).
        """
        size = self._sizes[bucket.height, bucket.width]
        spare = int(size.frames[size.place[row]]) - bucket.frames
        if not spare:
            return 0
        assert self.chunks.frames is not None
        return int(unit * (spare // self.chunks.frames + 1)) * self.chunks.frames

    def read(self, row: int, bucket: Bucket, start: int) -> Latents:
        """Mean and standard deviation of a window.

        Raises:
            MediaError: the file is damaged or not there any more.
        """
        size = self._sizes[bucket.height, bucket.width]
        place = size.place[row]
        name = size.names[int(size.file[place])]
        file = self.path / folder_name(bucket.height, bucket.width) / name
        window = slice(None)
        if bucket.frames != int(size.frames[place]):
            first = self.chunks.to_latents(start)
            window = slice(first, first + self.chunks.to_latents(bucket.frames))
        try:
            opened = self._file(file)
            mean, std = (
                opened.get_slice(f"{row}.{kind}")[:, window].astype(np.float32)
                for kind in ("mean", "std")
            )
        except (SafetensorError, OSError) as error:
            raise MediaError("corrupt", file, f"row {row}: {error}") from None
        return mean, std

    def _file(self, path: Path) -> Any:
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
            else:
                self._open[path] = safe_open(path, framework="np")
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            return self._open[path]


def folder_name(height: int, width: int) -> str:
    return f"latent_{height}x{width}"


def read_about(path: Path) -> dict[str, Any]:
    """What `cache.json` says.

    Raises:
        KinemaError: no cache, or one that is not complete.
    """
    file = path / "cache.json"
    if not file.is_file():
        if any(path.glob("latent_*x*")):
            raise KinemaError(
                "is not complete: encoding was interrupted",
                where=str(path),
                hint="the same `kinema latents encode` command goes on with it",
            )
        raise KinemaError(
            "is not a latent cache: it has no cache.json",
            where=str(path),
            hint="make one: kinema latents encode RECIPE --data-path MANIFEST -o FOLDER",
        )
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise KinemaError(
            f"is not of the format {FORMAT!r}", where=str(file), hint="make the cache again"
        )
    return about


def _read_size(folder: Path, height: int, width: int, files: dict[str, int]) -> Size:
    for name, nbytes in files.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if there != nbytes:
            raise KinemaError(
                f"has {there} bytes instead of {nbytes}",
                where=str(folder / name),
                hint="copy the cache again; or delete this file and cache.json, and encode again",
            )
    try:
        index = load_file(folder / INDEX)
    except (SafetensorError, OSError) as error:
        raise KinemaError(f"is not readable: {error}", where=str(folder / INDEX)) from None
    rows = index["row"]
    return Size(
        height=height,
        width=width,
        place={row: i for i, row in enumerate(rows.tolist())},
        rows=rows,
        file=index["file"],
        frames=index["frames"],
        names=tuple(name for name in files if name != INDEX),
    )


def _differences(cached: Any, wanted: Any, at: str) -> Iterator[str]:
    """`vae.micro_frame_size is 17 in the cache, now 9`, for every value that differs."""
    if isinstance(cached, dict) and isinstance(wanted, dict):
        for key in sorted(cached.keys() | wanted.keys()):
            yield from _differences(cached.get(key), wanted.get(key), f"{at}.{key}")
    elif json.dumps(cached) != json.dumps(wanted):
        if at == "videos":
            yield "it was made of other videos (paths, sizes or rates differ)"
        else:
            yield f"{at} is {json.dumps(cached)} in the cache, now {json.dumps(wanted)}"
