"""The data of a run as the loop takes it: micro-batches by position, and what there is to say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from torch import Tensor

from kinema.data.ahead import OneAhead
from kinema.data.buckets import Bucket, BucketTable
from kinema.data.latent_cache import LatentCache
from kinema.data.loader import Batch, KnownClips, Loader
from kinema.data.manifest import Manifest
from kinema.data.order import SampleOrder
from kinema.data.plan import Plan, make_plan
from kinema.generation.config import TrainedSize
from kinema.parallel.world import World
from kinema.training.components import SeenData
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost, bucket_degree, tokens_per_clip

MEASURED_MICRO_BATCHES = 16
"""How many micro-batches statistics of the latents are taken from."""


class Data(Protocol):
    """Where the loop gets its micro-batches and their names from."""

    @property
    def labels(self) -> list[str]:
        """Names of all buckets as the log has them, the same on every rank."""
        ...

    def epoch(self, number: int, start: int) -> tuple[int, Iterator[Batch]]:
        """Number of steps of an epoch, and this rank's micro-batches from step `start` on."""
        ...

    def first_videos(self) -> Iterable[Tensor]:
        """A few videos `[B, 3, T, H, W]` on the device, the same at each call."""
        ...

    def path(self, row: int) -> str:
        """The file of a row of the manifest."""
        ...


class Feed:
    """Manifest, order and loader of one rank.

    Args:
        known: clips that need not be decoded.
        latents: read in place of videos.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        manifest: Manifest,
        world: World,
        *,
        known: KnownClips = frozenset(),
        latents: LatentCache | None = None,
    ) -> None:
        self._recipe = recipe
        self._manifest = manifest
        self._world = world
        self._known = known
        self._latents = latents
        self._table = BucketTable.from_config(recipe.data)
        self.order = SampleOrder(
            manifest,
            self._table,
            bucket_cost(recipe),
            seed=recipe.seed,
            world_size=world.size,
            accumulation=recipe.accumulation,
            degree=bucket_degree(recipe),
            cached=latents,
        )
        self._loader: Loader | None = None
        self._on_gpu = world.device.type == "cuda"
        self._ahead: OneAhead[Batch] | None = None
        self._clips_came = False
        self.on_clip: Callable[[], None] | None = None
        """Called when clips came that are waited for."""

    def epoch(self, number: int, start: int) -> tuple[int, Iterator[Batch]]:
        """Number of steps of an epoch, and this rank's micro-batches from step `start` on."""
        if self._loader is None:
            self._loader = Loader(
                self._manifest,
                self._recipe.data,
                self.order,
                rank=self._world.rank,
                known=self._known,
                latents=self._latents,
                on_clip=self._clip_came,
                pinned=self._on_gpu,
            )
        steps, batches = self.order.epoch(number).num_steps, self._loader.epoch(number, start)
        if not self._on_gpu:
            return steps, batches
        self._end_ahead()
        self._ahead = OneAhead(batches, while_waiting=self._tell_of_clips)
        return steps, self._ahead

    def _clip_came(self) -> None:
        self._clips_came = True
        if not self._on_gpu:
            self._tell_of_clips()

    def _tell_of_clips(self) -> None:
        if self._clips_came and self.on_clip is not None:
            self._clips_came = False
            self.on_clip()

    def _end_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def decoding(self) -> list[tuple[int, str, float]]:
        """What is being decoded: (process id of the worker, file, seconds so far)."""
        return [] if self._loader is None else self._loader.decoding()

    def worker_pids(self) -> list[int]:
        """Process ids of the decode workers."""
        return [] if self._loader is None else self._loader.worker_pids()

    def first_videos(self) -> Iterator[Tensor]:
        """A few videos `[B, 3, T, H, W]` on the device, the same at each call and on any number
        of ranks."""
        order = SampleOrder(
            self._manifest,
            self._table,
            bucket_cost(self._recipe),
            seed=self._recipe.seed,
            world_size=1,
        )
        config = replace(self._recipe.data, num_workers=1)
        with Loader(self._manifest, config, order) as loader:
            for batch in islice(loader.epoch(0), MEASURED_MICRO_BATCHES):
                if not batch.empty:
                    yield batch.video.to(self._world.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._loader is not None:
            self._loader.close()  # first, so that nothing has to be decoded to the end
        self._end_ahead()

    @property
    def labels(self) -> list[str]:
        """Every resolution and length of the recipe, as the log names them."""
        return list(dict.fromkeys(bucket_label(b) for b in self._table.buckets))

    def path(self, row: int) -> str:
        """The file of a row."""
        return self._manifest.path(row)

    @cached_property
    def plan(self) -> Plan:
        """What the first epoch will be.

        Raises:
            NoMicroBatchesError: no clip trains; says why.
        """
        return make_plan(self._manifest, self.order, tokens=tokens_per_clip(self._recipe))

    @cached_property
    def seen(self) -> SeenData:
        """Shapes of the first epoch, and the median frame rate that the model is told."""
        buckets = sorted(self.plan.buckets, key=lambda b: -b.samples)
        sizes = tuple(
            TrainedSize(width=b.width, height=b.height, num_frames=b.num_frames) for b in buckets
        )
        rates = self._manifest.column("fps")[self._manifest.kept]
        rates = rates[np.isfinite(rates)]  # images have none
        data = self._recipe.data
        told = 1 if data.tell_source_fps else data.frame_interval
        fps = float(np.median(rates)) / told if rates.size else 24.0
        return SeenData(sizes, fps, data.frame_interval // told)


def bucket_label(bucket: Bucket) -> str:
    """Name of a resolution and length in the log: `480p-51f`."""
    return f"{bucket.resolution}-{bucket.frames}f"
