"""Micro-batches of pixels for one rank, decoded ahead of need in processes that can be killed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.data import draws
from kinema.data.buckets import Bucket
from kinema.data.config import DataConfig
from kinema.data.epoch import MicroBatch
from kinema.data.latent_cache import Latents
from kinema.data.order import SampleOrder
from kinema.media.clip import load_clip, load_image
from kinema.media.errors import MediaError
from kinema.media.info import IMAGE_SUFFIXES
from kinema.media.pool import DecodePool
from kinema.media.stores import suffix
from kinema.media.transform import last_crop_start, temporal_crop

IMAGE_FPS = 120.0
"""What 1.2 tells the model of pictures that do not move."""
AHEAD = 8
"""Micro-batches decoded ahead at most."""
AHEAD_BYTES = 4 << 30
"""Pixels decoded ahead at most; one micro-batch always is, however large."""
FEW_ROWS = 100
"""The fraction of bad rows counts as if at least so many had been asked for."""
NAMED = 5
"""Bad files that the last message names."""


class ClipKey(NamedTuple):
    """Which pixels a row of a micro-batch has: the same key is the same video."""

    row: int
    start: int
    """First frame of the window."""
    frames: int
    height: int
    width: int


class KnownClips(Protocol):
    """Clips whose pixels are not needed any more."""

    def __contains__(self, key: ClipKey, /) -> bool: ...


class LatentReader(Protocol):
    """Latents that were worked out before: `LatentCache`."""

    def start(self, row: int, bucket: Bucket, unit: float) -> int:
        """First frame of a window, for a uniform number in [0, 1)."""
        ...

    def read(self, row: int, bucket: Bucket, start: int) -> Latents:
        """Mean and standard deviation of a window; raises MediaError."""
        ...


class Clips(Protocol):
    """What is read of a manifest."""

    def column(self, name: str) -> NDArray[Any]: ...
    def text(self, row: int) -> str: ...
    def path(self, row: int) -> str: ...
    def absolute_path(self, row: int) -> Path | str: ...


@dataclass(frozen=True)
class SkippedRow:
    """A row left out of a micro-batch because its file could not be used."""

    row: int
    path: str
    reason: str
    """A key of `kinema.media.errors.REASONS`."""
    message: str


@dataclass(frozen=True)
class Batch:
    """What one rank trains on at once. Rows that could not be read are left out."""

    video: Tensor
    """float32 `[B, 3, T, H, W]` in [-1, 1]; B may be 0. Of the decoded rows alone, where some are
    known."""
    text: list[str]
    """`[B]`."""
    fps: Tensor
    """float32 `[B]`: frames per second to tell the model, as sampled, after `frame_interval` (or of
    the file: `tell_source_fps`); 120 for images."""
    rows: NDArray[np.int64]
    """`[B]` rows of the manifest."""
    keys: tuple[ClipKey, ...]
    """`[B]`."""
    decoded: tuple[bool, ...]
    """`[B]`, False: the loader was told that this clip is known."""
    bucket: Bucket
    weight: float
    """What its loss counts for, see `MicroBatch.weight`."""
    degree: int
    """Ranks that share it, see `MicroBatch.degree`: each has the whole of it."""
    skipped: list[SkippedRow]
    latents: tuple[Tensor, Tensor] | None = None
    """Mean and standard deviation of the normalised latents, float32 `[B, C, t, h, w]`, in place of
    pixels where they were worked out before."""

    def without(self, rows: Collection[int]) -> Batch:
        """The batch with some rows of the manifest left out."""
        kept = np.array([int(row) not in rows for row in self.rows], dtype=bool)
        if kept.all():
            return self
        decoded = torch.tensor(self.decoded, dtype=torch.bool)
        mask = torch.from_numpy(kept)
        return replace(
            self,
            video=self.video[mask[decoded].to(self.video.device)],
            text=[text for text, keep in zip(self.text, kept, strict=True) if keep],
            fps=self.fps[mask.to(self.fps.device)],
            rows=self.rows[kept],
            keys=tuple(key for key, keep in zip(self.keys, kept, strict=True) if keep),
            decoded=tuple(d for d, keep in zip(self.decoded, kept, strict=True) if keep),
            latents=self._moments(lambda v: v[mask.to(v.device)]),
        )

    def without_pixels(self) -> Batch:
        """What is to be said of it when its clips were seen."""
        return replace(self, video=self.video.new_empty(0), latents=None)

    def _moments(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
        return None if self.latents is None else (change(self.latents[0]), change(self.latents[1]))

    @property
    def num_frames(self) -> int:
        return self.bucket.frames

    @property
    def height(self) -> int:
        return self.bucket.height

    @property
    def width(self) -> int:
        return self.bucket.width

    @property
    def empty(self) -> bool:
        """No row could be read: there is nothing to compute, yet the rank still takes the step."""
        return not len(self.rows)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its pixels and rates on `device`; the host does not wait for a GPU."""
        beside = torch.device(device).type != "cpu"
        return replace(
            self,
            video=self.video.to(device, non_blocking=beside),
            fps=self.fps.to(device, non_blocking=beside),
            latents=self._moments(lambda v: v.to(device, non_blocking=beside)),
        )


@dataclass(frozen=True)
class _Ahead:
    """A micro-batch that is being decoded, or whose latents are being read."""

    micro: MicroBatch
    clips: list[tuple[ClipKey, Future[Any] | None]]
    """None: a known clip."""

    @property
    def nbytes(self) -> int:
        decoded = sum(clip is not None for _, clip in self.clips)
        return decoded * _clip_bytes(self.micro.bucket)


class Loader:
    """The micro-batches of one rank, in the order's order, the same for any number of workers.

    Use it as a context manager: it owns the decode workers.
    """

    def __init__(
        self,
        manifest: Clips,
        config: DataConfig,
        order: SampleOrder,
        *,
        rank: int = 0,
        known: KnownClips = frozenset(),
        latents: LatentReader | None = None,
        on_clip: Callable[[], None] = lambda: None,
        pinned: bool = False,
    ) -> None:
        """Args:
        manifest: the clips.
        config: how they are read.
        order: which clips, and when; its seed also draws where crops start.
        rank: whose micro-batches.
        known: clips not to decode; asked ahead of need, and a clip once known stays so.
        latents: read in place of videos.
        on_clip: called for every clip that was waited for, read or not: a sign of progress.
        pinned: tensors are in memory that a GPU reads by itself, several times as fast.
        """
        self._manifest = manifest
        self._config = config
        self._order = order
        self._rank = rank
        self._known = known
        self._latents = latents
        self._readers = ThreadPoolExecutor(config.num_workers, "latents") if latents else None
        self._on_clip = on_clip
        self._pinned = pinned
        self._asked = 0
        self._bad: list[SkippedRow] = []
        self._total_frames = manifest.column("num_frames")
        self._fps = manifest.column("fps")
        self._pool = DecodePool(config.num_workers, config.decode_timeout_s)

    def epoch(self, number: int, start_step: int = 0) -> Generator[Batch, None, None]:
        """This rank's micro-batches of an epoch, step by step, `accumulation` to a step.

        Raises:
            KinemaError: more than `max_bad_fraction` of the rows could not be read; names files.
        """
        epoch = self._order.epoch(number)
        positions = (
            (step, micro)
            for step in range(start_step, epoch.num_steps)
            for micro in range(epoch.accumulation)
        )
        coming = (epoch.micro_batch(step, self._rank, micro) for step, micro in positions)
        waiting = next(coming, None)
        ahead: deque[_Ahead] = deque()
        try:
            while ahead or waiting is not None:
                while waiting is not None and self._has_room(ahead, waiting):
                    ahead.append(self._start(waiting, number))
                    waiting = next(coming, None)
                yield self._finish(ahead.popleft())
        finally:
            for batch in ahead:
                for _, clip in batch.clips:
                    if clip is not None:
                        clip.cancel()

    @property
    def skipped(self) -> list[SkippedRow]:
        """All rows left out so far."""
        return list(self._bad)

    def decoding(self) -> list[tuple[int, str, float]]:
        """What is being decoded: (process id of the worker, file, seconds so far)."""
        return self._pool.at_work()

    def worker_pids(self) -> list[int]:
        """Process ids of the decode workers."""
        return self._pool.worker_pids()

    def close(self) -> None:
        """End the decode workers."""
        self._pool.close()
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _has_room(self, ahead: deque[_Ahead], more: MicroBatch) -> bool:
        if not ahead:
            return True
        if self._latents is not None:  # a hundredth of the pixels that the bytes are counted for
            return len(ahead) < AHEAD
        nbytes = sum(a.nbytes for a in ahead) + len(more.rows) * _clip_bytes(more.bucket)
        return len(ahead) < AHEAD and nbytes <= AHEAD_BYTES

    def _start(self, micro: MicroBatch, epoch: int) -> _Ahead:
        return _Ahead(micro, [self._decode(int(row), micro.bucket, epoch) for row in micro.rows])

    def _decode(self, row: int, bucket: Bucket, epoch: int) -> tuple[ClipKey, Future[Any] | None]:
        size, transform = (bucket.height, bucket.width), self._config.transform
        if self._latents is not None and self._readers is not None:
            start = self._latents.start(row, bucket, self._window(row, epoch))
            key = ClipKey(row, start * self._config.frame_interval, bucket.frames, *size)
            return key, self._readers.submit(self._latents.read, row, bucket, start)
        path = self._manifest.absolute_path(row)
        image = suffix(path) in IMAGE_SUFFIXES
        indices = [0] if image else self._crop(row, bucket.frames, epoch)
        # Where a window starts says where it goes on, and crops of a frame are not drawn.
        key = ClipKey(row, indices[0], bucket.frames, *size)
        if key in self._known:
            return key, None
        if image:
            return key, self._pool.submit(load_image, path, size, transform)
        return key, self._pool.submit(load_clip, path, indices, size, transform)

    def _crop(self, row: int, num_frames: int, epoch: int) -> list[int]:
        """Frames of this row in this epoch."""
        total, interval = int(self._total_frames[row]), self._config.frame_interval
        last = last_crop_start(total, num_frames, interval)
        start = int(self._window(row, epoch) * (last + 1))
        return temporal_crop(total, num_frames, interval, start)

    def _window(self, row: int, epoch: int) -> float:
        """In [0, 1): where a window starts; depends on (seed, epoch, row) alone."""
        draw = draws.uniform(draws.key(self._order.seed, "temporal crop", epoch), row)
        return float(draw[0])

    def _finish(self, ahead: _Ahead) -> Batch:
        """Wait for the clips; those that failed are left out and counted."""
        micro, bucket = ahead.micro, ahead.micro.bucket
        shape = (3, bucket.frames, bucket.height, bucket.width)
        pixels = 0 if self._latents else sum(clip is not None for _, clip in ahead.clips)
        video = torch.empty(pixels, *shape, pin_memory=self._pinned)
        moments: list[Latents] = []
        keys: list[ClipKey] = []
        decoded: list[bool] = []
        skipped: list[SkippedRow] = []
        for key, clip in ahead.clips:
            try:
                if clip is not None and self._latents is not None:
                    moments.append(clip.result())
                elif clip is not None:
                    video[sum(decoded)] = torch.from_numpy(clip.result())
                keys.append(key)
                decoded.append(clip is not None and self._latents is None)
            except MediaError as error:
                name = self._manifest.path(key.row)
                skipped.append(SkippedRow(key.row, name, error.reason, error.what))
            self._on_clip()
        ahead.clips.clear()  # their pixels are copied
        rows = [key.row for key in keys]
        self._count(len(micro.rows), skipped)
        return Batch(
            video=video[: sum(decoded)],
            text=[self._manifest.text(row) for row in rows],
            fps=torch.tensor([self._told_fps(row) for row in rows], dtype=torch.float32),
            rows=np.array(rows, dtype=np.int64),
            keys=tuple(keys),
            decoded=tuple(decoded),
            bucket=bucket,
            weight=micro.weight,
            degree=micro.degree,
            skipped=skipped,
            latents=_stack(moments, pinned=self._pinned) if moments else None,
        )

    def _told_fps(self, row: int) -> float:
        fps = float(self._fps[row])
        if not np.isfinite(fps) or fps <= 0:  # images, and videos of one frame without duration
            return IMAGE_FPS
        return fps if self._config.tell_source_fps else fps / self._config.frame_interval

    def _count(self, asked: int, skipped: list[SkippedRow]) -> None:
        self._asked += asked
        self._bad.extend(skipped)
        limit = self._config.max_bad_fraction
        if len(self._bad) > limit * max(self._asked, FEW_ROWS):
            files = "".join(f"\n  {bad.path}: {bad.message}" for bad in self._bad[-NAMED:])
            raise KinemaError(
                f"{len(self._bad)} of {self._asked} clips could not be read, more than "
                f"max_bad_fraction={limit:g}; the last ones:{files}",
                where=f"rank {self._rank}",
                hint="run `kinema data check` on the manifest, or raise data.max_bad_fraction",
            )


def _clip_bytes(bucket: Bucket) -> int:
    return 3 * bucket.frames * bucket.height * bucket.width * 4


def _stack(moments: list[Latents], *, pinned: bool) -> tuple[Tensor, Tensor]:
    mean, std = (torch.from_numpy(np.stack(values)) for values in zip(*moments, strict=True))
    return (mean.pin_memory(), std.pin_memory()) if pinned else (mean, std)
