"""Latents that other programs wrote, taken over into a cache of ours."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.data.latent_cache import Latents
from kinema.data.latent_cache_writer import Clip, LatentCacheWriter
from kinema.data.manifest import Manifest
from kinema.models.config import ImageVAEConfig, VideoVAEConfig
from kinema.telemetry.progress import Progress
from kinema.training.config import TrainRecipe
from kinema.training.encode_latents import CLIPS_PER_FILE, chunks_of, made_from


@dataclass(frozen=True)
class Imported:
    """What `import_npz` did.

    Attributes:
        clips: by (height, width), all that the cache has.
        new: taken over by this call.
        missing: rows of the manifest without a file.
    """

    clips: dict[tuple[int, int], int]
    new: int
    missing: int


def import_npz(
    recipe: TrainRecipe, manifest: Manifest, source: Path, path: Path, *, dtype: str = "float16"
) -> Imported:
    """Take over the layout of the MindSpore port's `infer_vae.py`.

    A clip `a/b.mp4` has `SOURCE/a/b.npz`, or one in each `SOURCE/latent_HEIGHTxWIDTH/`, with
    `latent_mean` and `latent_std` `[T, C, h, w]` before scaling, and perhaps `fps` and `ori_size`
    (height, width) of the video. Without `latent_std` it counts as 0.

    Args:
        recipe: whose autoencoder made them: its scaling is applied.
        path: the folder of the cache.
        dtype: `float16` or `float32`.

    Raises:
        KinemaError: no files, or such that do not fit; names the file.
    """
    writer = LatentCacheWriter(path, made_from(recipe, manifest, None), dtype=dtype)
    folders = sorted(source.glob("latent_*x*")) or [source]
    pending: dict[tuple[int, int], list[tuple[Clip, Latents, float, tuple[int, int]]]] = {}
    there: dict[tuple[int, int], dict[int, int]] = {}
    new, rows_found = 0, set()
    fps, tall, wide = (manifest.column(name) for name in ("fps", "height", "width"))

    def flush(size: tuple[int, int]) -> None:
        clips, latents, rates, originals = zip(*pending.pop(size), strict=True)
        writer.write(clips, latents, rates, originals)

    with Progress("importing latents", total=len(manifest) * len(folders), unit="clip") as bar:
        for folder in folders:
            for row, file in _files(folder, manifest):
                bar.advance()
                if file is None:
                    continue
                mean, std, rate, original = _read(file)
                clip = _clip(recipe, row, mean, file)
                rows_found.add(row)
                size = (clip.height, clip.width)
                if size not in there:
                    there[size] = writer.there(*size)
                if there[size].get(row, 0) >= clip.frames:
                    continue
                known = original or (int(tall[row]), int(wide[row]))
                rate = float(fps[row]) if rate is None else rate
                entry = (clip, _normalised(recipe, mean, std), rate, known)
                pending.setdefault(size, []).append(entry)
                new += 1
                if len(pending[size]) == CLIPS_PER_FILE:
                    flush(size)
    for size in list(pending):
        flush(size)
    if not rows_found:
        raise KinemaError(
            "has no .npz file named as a clip of the manifest",
            where=str(source),
            hint=f"looked for {Path(manifest.path(0)).with_suffix('.npz')} and so on",
        )
    return Imported(writer.finish(len(manifest)), new, len(manifest) - len(rows_found))


def _files(folder: Path, manifest: Manifest) -> Iterator[tuple[int, Path | None]]:
    for row in range(len(manifest)):
        name = Path(manifest.path(row)).with_suffix(".npz")
        if name.is_absolute():  # then it is below the data root, or only its name can be known
            inside = name.is_relative_to(manifest.root)
            name = name.relative_to(manifest.root) if inside else Path(name.name)
        file = folder / name
        yield row, file if file.is_file() else None


def _read(
    file: Path,
) -> tuple[NDArray[np.float32], NDArray[np.float32], float | None, tuple[int, int] | None]:
    """Mean and standard deviation `[C, T, h, w]`, frame rate, height and width of the video."""
    try:
        with np.load(file, allow_pickle=False) as found:
            mean = found["latent_mean"].astype(np.float32)
            std = (
                found["latent_std"].astype(np.float32)
                if "latent_std" in found
                else np.zeros_like(mean)
            )
            rate = _numbers(found["fps"]) if "fps" in found else []
            size = _numbers(found["ori_size"]) if "ori_size" in found else []
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise KinemaError(f"is not readable: {error}", where=str(file)) from None
    if mean.ndim != 4 or std.shape != mean.shape:
        raise KinemaError(
            f"latent_mean is {list(mean.shape)} and latent_std {list(std.shape)}; "
            "both must be [frames, channels, height, width]",
            where=str(file),
        )
    original = (int(size[0]), int(size[1])) if len(size) == 2 else None
    return mean.swapaxes(0, 1), std.swapaxes(0, 1), rate[0] if rate else None, original


def _numbers(values: NDArray[np.generic]) -> list[float]:
    """Of an array of numbers; what was saved as None is an object, which is not read."""
    return np.atleast_1d(values.astype(np.float64)).tolist()


def _clip(recipe: TrainRecipe, row: int, mean: NDArray[np.float32], file: Path) -> Clip:
    channels, latent_frames, height, width = mean.shape
    if channels != recipe.vae.latent_channels:
        raise KinemaError(
            f"has {channels} channels, the recipe's autoencoder {recipe.vae.latent_channels}",
            where=str(file),
            hint="the recipe whose `vae` they were made with",
        )
    chunks = chunks_of(recipe.vae)
    frames = latent_frames
    if latent_frames > 1 and chunks.frames != 1:
        if chunks.frames is None or latent_frames % chunks.latents:
            raise KinemaError(
                f"has {latent_frames} latent frames, which are no whole chunks of the autoencoder",
                where=str(file),
            )
        frames = latent_frames // chunks.latents * chunks.frames
    stride = recipe.vae.spatial_stride
    return Clip(row, frames, height * stride, width * stride)


def _normalised(
    recipe: TrainRecipe, mean: NDArray[np.float32], std: NDArray[np.float32]
) -> Latents:
    vae = recipe.vae
    if isinstance(vae, VideoVAEConfig):
        shift, scale = (
            np.array(v, np.float32).reshape(-1, 1, 1, 1) for v in (vae.shift, vae.scale)
        )
        return (mean - shift) / scale, std / scale
    assert isinstance(vae, ImageVAEConfig)
    return mean * vae.scaling_factor, std * vae.scaling_factor
