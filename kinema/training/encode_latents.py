"""Latents of a manifest's clips worked out once, for `latent_cache` of a recipe."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinema.config.errors import ConfigError
from kinema.config.settings import to_dict
from kinema.data.buckets import AREA_TOLERANCE, BucketTable, Length
from kinema.data.latent_cache import Chunks, LatentCache, Latents
from kinema.data.latent_cache_writer import Clip, LatentCacheWriter
from kinema.data.manifest import Manifest
from kinema.data.text_cache import StaleCacheError
from kinema.media.clip import load_frames
from kinema.media.errors import MediaError
from kinema.media.info import IMAGE_SUFFIXES
from kinema.media.pool import DecodePool
from kinema.media.stores import suffix
from kinema.media.transform import temporal_crop
from kinema.models.autoencoder import Autoencoder
from kinema.models.config import VAEConfig, VideoVAEConfig
from kinema.parallel.world import World
from kinema.telemetry.progress import Progress
from kinema.telemetry.run_log import say
from kinema.training.config import TrainRecipe

CLIPS_PER_FILE = 64
AT_ONCE_PIXELS = 64 << 20
"""Pixels, over frames and clips, that are encoded at once; one clip always is."""
NOT_IN_KEY = ("micro_batch_size", "shift", "scale")
"""Settings of an autoencoder that leave latents as they are, or that come with its weights."""


@dataclass(frozen=True)
class Encoded:
    """What `encode_latents` did.

    Attributes:
        clips: by (height, width), all that the cache has.
        new: encoded by this call, on all ranks.
        unreadable: path and what is wrong with it.
    """

    clips: dict[tuple[int, int], int]
    new: int
    unreadable: list[tuple[str, str]]


def chunks_of(vae: VAEConfig) -> Chunks:
    """The runs of frames that an autoencoder encodes by themselves."""
    if not isinstance(vae, VideoVAEConfig):
        return Chunks(1, 1)
    if vae.micro_frame_size is None:
        return Chunks(None, 0)
    return Chunks(vae.micro_frame_size, math.ceil(vae.micro_frame_size / vae.time_stride))


def vae_key(vae: VAEConfig) -> dict[str, Any]:
    """The settings that latents depend on."""
    return {k: v for k, v in to_dict(vae).items() if k not in NOT_IN_KEY}


def weights_id(vae: Autoencoder) -> str:
    """Names an autoencoder's weights: a hash of all of them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def made_from(recipe: TrainRecipe, manifest: Manifest, weights: str | None) -> dict[str, Any]:
    """Everything that the latents of a recipe depend on."""
    return {
        "videos": manifest.video_fingerprint,
        "vae": vae_key(recipe.vae),
        "weights": weights,
        "frame_interval": recipe.data.frame_interval,
        "transform": recipe.data.transform,
        "chunks": vars(chunks_of(recipe.vae)),
    }


def open_latents(recipe: TrainRecipe, manifest: Manifest) -> LatentCache | None:
    """The cache that a recipe names; None: it names none.

    Raises:
        KinemaError: there is no such cache, or it is of something else.
    """
    if recipe.latent_cache is None:
        return None
    return LatentCache.open(
        recipe.latent_cache,
        manifest,
        vae=vae_key(recipe.vae),
        frame_interval=recipe.data.frame_interval,
        transform=recipe.data.transform,
    )


def check_weights(cache: LatentCache, vae: Autoencoder) -> None:
    """Whether a cache was made with these weights.

    Raises:
        StaleCacheError: with others.
    """
    if cache.weights is not None and cache.weights != weights_id(vae):
        raise StaleCacheError(
            "was made with other weights of the autoencoder than `vae_weights`",
            where=str(cache.path),
            hint="name the autoencoder it was made with, or encode again",
        )


def wanted_clips(
    recipe: TrainRecipe,
    manifest: Manifest,
    *,
    resolutions: Sequence[str] = (),
    whole: bool = False,
) -> list[Clip]:
    """Which clips are encoded at which sizes: wherever the recipe's buckets may take them.

    Args:
        resolutions: only these; all of the recipe's by default.
        whole: as many frames as a clip has, rather than the longest bucket that it fits.

    Raises:
        ConfigError: a resolution that the recipe has not; lengths of which several would have to
            be encoded.
    """
    table, chunks = BucketTable.from_config(recipe.data), chunks_of(recipe.vae)
    unknown = [name for name in resolutions if name not in recipe.data.buckets]
    if unknown:
        raise ConfigError(
            f"the recipe has no buckets of {unknown[0]}",
            where="--resolution",
            hint=f"it has {', '.join(recipe.data.buckets)}",
        )
    interval = recipe.data.frame_interval
    total, height, width = (
        manifest.column(name).astype(np.int64) for name in ("num_frames", "height", "width")
    )
    open_ = np.flatnonzero(manifest.kept)
    found: list[Clip] = []
    for level, lengths in table.levels:
        taken = [length for length in lengths if length.first_bucket is not None]
        _check_lengths(level.name, taken, chunks)
        large = height[open_] * width[open_] >= level.pixels * AREA_TOLERANCE
        rows = open_[large]
        frames, stays = _frames_and_stays(total[rows], taken, interval)
        if whole and chunks.frames is not None:
            used = -(-total[rows] // interval)  # every interval-th, from the first
            longest = used // chunks.frames * chunks.frames
            frames = np.where((frames > 1) & (total[rows] > 1), np.maximum(frames, longest), frames)
        if not resolutions or level.name in resolutions:
            sizes = level.closest(height[rows], width[rows])
            found += [
                Clip(int(row), int(count), *level.sizes[size])
                for row, count, size in zip(rows, frames, sizes, strict=True)
                if count
            ]
        open_ = np.setdiff1d(open_, rows[stays], assume_unique=True)
    return found


def _check_lengths(resolution: str, lengths: list[Length], chunks: Chunks) -> None:
    videos = [length.frames for length in lengths if length.frames > 1]
    uncut = [frames for frames in videos if not chunks.whole(frames)]
    if uncut and len(videos) > 1:
        size = f"runs of {chunks.frames} frames" if chunks.frames else "videos as a whole"
        raise ConfigError(
            f"{resolution}: windows of {uncut[0]} frames cannot be cut out of latents of longer "
            f"ones, as the autoencoder encodes {size}",
            where="data.buckets",
            hint="one length of video per resolution"
            + (f", or multiples of {chunks.frames} frames" if chunks.frames else ""),
        )


def _frames_and_stays(
    total: NDArray[np.int64], lengths: list[Length], interval: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[n] frames of the longest length that each clip may be cut to (0: none), and whether it
    certainly stays at this resolution."""
    frames = np.zeros(len(total), dtype=np.int64)
    stays = np.zeros(len(total), dtype=np.bool_)
    undecided = np.ones(len(total), dtype=np.bool_)
    for length in lengths:  # from the longest
        fits = (
            total == 1 if length.frames == 1 else (total > 1) & (total > length.frames * interval)
        )
        frames = np.where(fits & (frames == 0), length.frames, frames)
        if length.attempt is None or length.attempt >= 1:
            # Whoever comes to this length goes no further down.
            stays |= fits & undecided & (length.keep >= 1)
            undecided &= ~fits
        elif length.keep < 1:
            undecided &= ~fits  # some of those who try are sent on to lower resolutions
    return frames, stays


@torch.no_grad()
def encode_latents(
    recipe: TrainRecipe,
    manifest: Manifest,
    vae: Autoencoder,
    path: str | Path,
    world: World,
    *,
    resolutions: Sequence[str] = (),
    whole: bool = False,
    dtype: str = "float16",
    clips_per_file: int = CLIPS_PER_FILE,
) -> Encoded:
    """Encode the clips of a manifest; goes on where an earlier call of the same work stopped.

    Ranks take files in turn. A video that cannot be read is left out and reported.

    Args:
        vae: with weights, on the device of `world`.
        path: the folder of the cache.
        resolutions, whole: see `wanted_clips`.
        dtype: `float16` or `float32`.
        clips_per_file: so much is lost, per rank, when the work is interrupted.

    Raises:
        KinemaError: the folder holds something else, cannot be written, or no clip could be read.
    """
    writer = LatentCacheWriter(path, made_from(recipe, manifest, weights_id(vae)), dtype=dtype)
    clips = wanted_clips(recipe, manifest, resolutions=resolutions, whole=whole)
    files = list(_pending(writer, clips, clips_per_file))
    world.barrier()  # all have looked at what is there before anybody adds to it
    mine = files[world.rank :: world.size]
    unreadable: list[tuple[str, str]] = []
    encoded = 0
    fps, tall, wide = (manifest.column(name) for name in ("fps", "height", "width"))
    todo = sum(len(file) for file in mine)
    data = recipe.data
    with (
        DecodePool(data.num_workers, data.decode_timeout_s) as pool,
        Progress("encoding latents", total=todo, unit="clip") as bar,
    ):
        ordered = [clip for file in mine for clip in file]
        pixels = _decoded(pool, manifest, recipe, ordered)
        for file in mine:
            done: list[tuple[Clip, Latents]] = []
            for clip, latents in _encode(vae, world.device, [next(pixels) for _ in file]):
                if isinstance(latents, MediaError):
                    name = manifest.path(clip.row)
                    unreadable.append((name, latents.what))
                    say(f"left out {name}: {latents.what}")
                else:
                    done.append((clip, latents))
                bar.advance()
            if done:
                rows = [clip.row for clip, _ in done]
                writer.write(
                    [clip for clip, _ in done],
                    [latents for _, latents in done],
                    [float(fps[row]) for row in rows],
                    [(int(tall[row]), int(wide[row])) for row in rows],
                )
                encoded += len(done)
    all_unreadable = [one for of_rank in world.gather(unreadable) for one in of_rank]
    new = sum(world.gather(encoded))
    counts = _finish(writer, len(manifest), world)
    return Encoded(counts, new, all_unreadable)


def _finish(writer: LatentCacheWriter, rows: int, world: World) -> dict[tuple[int, int], int]:
    result: dict[tuple[int, int], int] | Exception = {}
    if world.is_main:
        try:
            result = writer.finish(rows)
        except Exception as error:
            result = error
    result = world.broadcast(result)
    if isinstance(result, Exception):
        raise result
    return result


def _pending(writer: LatentCacheWriter, clips: list[Clip], per_file: int) -> Iterator[list[Clip]]:
    """The files that are still to be made: clips of one size, long ones with long ones."""

    def size(clip: Clip) -> tuple[int, int]:
        return clip.height, clip.width

    for of_size, group in groupby(sorted(clips, key=lambda c: (*size(c), c.frames, c.row)), size):
        there = writer.there(*of_size)
        # A size may come from two resolutions: the longer latents serve both.
        longest = {clip.row: clip for clip in group}
        left = [c for c in longest.values() if there.get(c.row, 0) < c.frames]
        for start in range(0, len(left), per_file):
            yield left[start : start + per_file]


Decoded = tuple[Clip, NDArray[np.float32] | MediaError]


def _decoded(
    pool: DecodePool, manifest: Manifest, recipe: TrainRecipe, clips: list[Clip]
) -> Iterator[Decoded]:
    """Pixels `[3, T, H, W]` of clips, in their order, decoded ahead."""
    transform, interval = recipe.data.transform, recipe.data.frame_interval
    total = manifest.column("num_frames")

    def call(clip: Clip) -> tuple[Any, ...]:
        path, size = manifest.absolute_path(clip.row), (clip.height, clip.width)
        if suffix(path) in IMAGE_SUFFIXES:
            return path, None, size, transform
        indices = temporal_crop(int(total[clip.row]), clip.frames, interval, 0)
        return path, indices, size, transform

    return pool.map(load_frames, clips, call=call)


def _encode(
    vae: Autoencoder, device: torch.device, clips: list[Decoded]
) -> Iterator[tuple[Clip, Latents | MediaError]]:
    """Clips of one size, several of one length at once."""
    for frames, group in groupby(clips, lambda one: one[0].frames):
        members = list(group)
        of_clip = frames * members[0][0].height * members[0][0].width
        at_once = max(1, AT_ONCE_PIXELS // of_clip)
        for start in range(0, len(members), at_once):
            part = members[start : start + at_once]
            good = [pixels for _, pixels in part if not isinstance(pixels, MediaError)]
            moments = (
                iter(()) if not good else _moments(vae, torch.from_numpy(np.stack(good)), device)
            )
            for clip, pixels in part:
                yield clip, pixels if isinstance(pixels, MediaError) else next(moments)


def _moments(vae: Autoencoder, video: Tensor, device: torch.device) -> Iterator[Latents]:
    posterior = vae.posterior(video.to(device))
    mean, std = posterior.mean.float().cpu().numpy(), posterior.std.float().cpu().numpy()
    yield from zip(mean, std, strict=True)
