"""Clips held out from training: which ones a validation looks at, and what it needs of them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinema.config.errors import ConfigError, KinemaError
from kinema.data.buckets import Bucket, BucketTable, keyed_draw
from kinema.data.config import DataConfig
from kinema.data.loader import IMAGE_FPS
from kinema.data.manifest import Manifest
from kinema.media.clip import load_clip, load_image
from kinema.media.errors import MediaError
from kinema.media.info import IMAGE_SUFFIXES
from kinema.media.pool import DecodePool
from kinema.media.stores import is_url, join, suffix
from kinema.media.transform import temporal_crop
from kinema.models.autoencoder import Autoencoder
from kinema.models.text import TextEncoder

Floats = NDArray[np.float32]

NAMED = 3
"""Shared clips that the message names."""


@dataclass(frozen=True)
class HeldOut:
    """A clip as it is validated."""

    row: int
    """Of the validation manifest."""
    bucket: Bucket


@dataclass(frozen=True)
class Prepared:
    """What the transformer takes of a clip, on the CPU."""

    latents: Tensor
    """`[1, C, t, h, w]`, float32: the mean of the posterior."""
    y: Tensor
    """Text features, see `TextFeatures`, of one caption."""
    mask: Tensor | None
    fps: float

    @property
    def nbytes(self) -> int:
        mask = 0 if self.mask is None else self.mask.nbytes
        return self.latents.nbytes + self.y.nbytes + mask


def choose(manifest: Manifest, data: DataConfig, per_bucket: int) -> list[HeldOut]:
    """The first clips of each resolution and length that `data` trains.

    A clip serves every resolution and length that it is large and long enough for, whatever their
    probabilities: the choice depends on no seed.

    Raises:
        ConfigError: no clip fits anywhere.
    """
    chosen = []
    sizes = [manifest.column(name) for name in ("num_frames", "height", "width")]
    for resolution, lengths in BucketTable.from_config(data).levels:
        for length in lengths:
            if length.first_bucket is None:
                continue
            _, batch = data.buckets[resolution.name][length.frames]
            alone = BucketTable(
                {resolution.name: {length.frames: (1.0, batch)}}, data.frame_interval
            )
            found = alone.assign(sizes[0], sizes[1], sizes[2], keyed_draw(0, 0))
            rows = np.flatnonzero((found >= 0) & manifest.kept)[:per_bucket]
            chosen += [HeldOut(int(row), alone.buckets[found[row]]) for row in rows]
    if not chosen:
        raise ConfigError(
            f"no clip of {manifest.source} is large and long enough for a bucket of the recipe",
            where="validation.path",
            hint=f"kinema data plan RECIPE --data-path {manifest.source} says why",
        )
    return chosen


def refuse_shared(manifest: Manifest, training: Manifest) -> None:
    """Refuse a validation manifest that has clips of the training manifest: the same file.

    Raises:
        KinemaError: says how many, and names some.
    """
    paths = training.table.column("path")
    written: list[str] = []  # the held-out files as the training manifest would write them
    for path in manifest.table.column("path").to_pylist():
        whole = join(manifest.root, path)
        if is_url(whole):
            root = f"{training.root}/"
            written += [str(whole), str(whole).removeprefix(root)]
            continue
        whole = os.path.normpath(whole)
        below = os.path.relpath(whole, training.root)
        written += [whole, below, f"./{below}"]
    shared = paths.filter(pc.is_in(paths, pa.array(written, paths.type)))
    if len(shared):
        names = ", ".join(shared[:NAMED].to_pylist()) + (" ..." if len(shared) > NAMED else "")
        raise KinemaError(
            f"{len(shared)} of its {len(manifest)} clips are trained on as well: {names}",
            where=manifest.source,
            hint="hold them out: take these rows from one of the two manifests",
        )


class Preparer:
    """Decodes and encodes clips.

    Args:
        vae, text: frozen, on `device`.
    """

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        vae: Autoencoder,
        text: TextEncoder,
        device: torch.device,
    ) -> None:
        self._manifest = manifest
        self._data = data
        self._vae = vae
        self._text = text
        self._device = device

    @torch.no_grad()
    def prepare(self, clips: Sequence[HeldOut]) -> Iterator[Prepared | MediaError]:
        """The first window of each clip, in order, or why it cannot be read. Files are decoded
        ahead, while the one before is encoded."""
        config = self._data
        coming = iter(clips)
        ahead: deque[tuple[HeldOut, Future[Floats]]] = deque()
        with DecodePool(config.num_workers, config.decode_timeout_s) as pool:
            while True:
                for clip in islice(coming, config.num_workers + 1 - len(ahead)):
                    ahead.append((clip, self._decode(pool, clip)))
                if not ahead:
                    return
                clip, video = ahead.popleft()
                try:
                    pixels = torch.from_numpy(video.result())[None].to(self._device)
                except MediaError as error:
                    yield error
                    continue
                text = self._text.encode([self._manifest.text(clip.row)])
                latents = self._vae.encode(pixels).float().cpu()
                yield Prepared(latents, text.y.cpu(), text.mask, self._fps(clip.row))

    def _decode(self, pool: DecodePool, clip: HeldOut) -> Future[Floats]:
        path, config = self._manifest.absolute_path(clip.row), self._data
        size = (clip.bucket.height, clip.bucket.width)
        if suffix(path) in IMAGE_SUFFIXES:
            return pool.submit(load_image, path, size, config.transform)
        total = int(self._manifest.column("num_frames")[clip.row])
        indices = temporal_crop(total, clip.bucket.frames, config.frame_interval, 0)
        return pool.submit(load_clip, path, indices, size, config.transform)

    def _fps(self, row: int) -> float:
        fps = float(self._manifest.column("fps")[row])
        if not np.isfinite(fps) or fps <= 0:
            return IMAGE_FPS
        return fps if self._data.tell_source_fps else fps / self._data.frame_interval
