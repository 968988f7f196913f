"""The stages of a demo, each through the same functions as the commands of that name."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinema.config.errors import KinemaError
from kinema.config.recipe import load_recipe
from kinema.config.settings import to_dict
from kinema.data.buckets import BucketTable
from kinema.data.check import check_manifest, mark_bad
from kinema.data.index import index_folder
from kinema.data.manifest import Manifest
from kinema.data.order import SampleOrder
from kinema.data.plan import make_plan
from kinema.data.world import COLOURS, WorldSpec, caption, held_out_scenes, write_world
from kinema.demo.config import CLIP_FPS, DemoConfig
from kinema.evaluation.hue import hue_of, measure_hue, nearest_colour
from kinema.generation.clip import slug
from kinema.generation.pipeline import Pipeline
from kinema.media.read import read_frames
from kinema.media.write import write_video
from kinema.models.autoencoder import Autoencoder
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost
from kinema.training.run import train
from kinema.training.start import Start

WORKERS = 2
RECONSTRUCTED = 8
"""Clips that are shown beside what the autoencoder makes of them."""
HUES = {name: hue_of(rgb) for name, rgb in COLOURS.items()}

OnDone = Callable[[int], None]
"""Called with the number of steps, clips or videos that were just finished."""


class DemoInterruptedError(KinemaError):
    """The person asked the demo to stop; it can be continued."""

    exit_code = 130


def render(folder: Path, config: DemoConfig) -> dict[str, Any]:
    """Write the clips of the procedural world and their captions."""
    # A clip of 17 frames needs one of 18, which has one crop: its latents are encoded once.
    spec = WorldSpec(seed=config.seed, count=config.clips, frames=18, hold_out=config.prompts)
    write_world(folder, spec)
    return to_dict(spec)


def index(folder: Path, config: DemoConfig) -> dict[str, Any]:
    """`kinema data index`."""
    videos = Path(config.videos) if config.videos else folder / "clips"
    captions = Path(config.captions) if config.captions else None
    if config.videos is None:
        captions = folder / "captions.csv"
    report = index_folder(videos, manifest_path(folder), captions=captions, workers=WORKERS)
    return {
        "rows": report.rows,
        "refused": [[r.path, r.reason] for r in report.refused],
        "without_caption": len(report.without_caption),
    }


def check(folder: Path) -> dict[str, Any]:
    """`kinema data check`: bad clips stay in the manifest, marked as dropped."""
    path = manifest_path(folder)
    manifest = Manifest.read(path)
    bad = check_manifest(manifest, workers=WORKERS)
    if bad:
        mark_bad(manifest, bad).write(path)
    return {"clips": int(manifest.kept.sum()), "bad": [[b.path, b.reason, b.message] for b in bad]}


def plan(folder: Path, config: DemoConfig) -> dict[str, Any]:
    """`kinema data plan`: where every clip goes."""
    recipe = load_recipe("tiny/world", TrainRecipe, model_overrides(folder, config))
    manifest = Manifest.read(manifest_path(folder))
    order = SampleOrder(
        manifest,
        BucketTable.from_config(recipe.data),
        bucket_cost(recipe),
        seed=recipe.seed,
        world_size=1,
        accumulation=recipe.accumulation,
    )
    return make_plan(manifest, order).to_dict()


def train_vae(folder: Path, config: DemoConfig, on_done: OnDone) -> dict[str, Any]:
    """`kinema train-vae tiny/vae`."""
    overrides = [*config.vae_overrides, *_data_overrides(folder, config)]
    return _train(folder, "tiny/vae", overrides, on_done)


def train_model(folder: Path, config: DemoConfig, on_done: OnDone) -> dict[str, Any]:
    """`kinema train tiny/world`."""
    return _train(folder, "tiny/world", model_overrides(folder, config), on_done)


def model_overrides(folder: Path, config: DemoConfig) -> list[str]:
    overrides = [*config.model_overrides, *_data_overrides(folder, config)]
    vae = _run_folder(folder, "tiny-vae")
    return [*overrides, f"vae_weights={json.dumps(str(vae))}"] if vae else overrides


def generate(folder: Path, config: DemoConfig, on_done: OnDone) -> dict[str, Any]:
    """`kinema generate`: combinations that no clip shows, or a person's own captions."""
    run = _run_folder(folder, "tiny-world")
    assert run is not None
    pipeline = Pipeline.from_pretrained(run)
    videos = folder / "videos"
    wanted = _prompts(folder, config)
    items, requests = [], []
    for number, item in enumerate(wanted):
        path = videos / f"{number:02d}-{slug(item['prompt'])}.mp4"
        items.append({**item, "path": str(path.relative_to(folder))})
        requests.append(pipeline.request(item["prompt"], seed=config.seed + number))
    missing = [r for r, i in zip(requests, items, strict=True) if not _whole(folder / i["path"])]
    paths = {r: folder / i["path"] for r, i in zip(requests, items, strict=True)}
    on_done((len(requests) - len(missing)) * requests[0].num_sampling_steps)
    for clip in pipeline.generate_all(missing, batch_size=8, on_step=on_done):
        clip.save(paths[clip.request], overwrite=True)
    return {"items": items, "request": to_dict(requests[0])}


def measure(folder: Path, items: list[dict[str, Any]]) -> dict[str, Any]:
    """The colour of the thing in each generated clip, against the prompt's; and, to test the
    ruler itself, in as many clips of the training data."""
    verdicts = []
    for item in items:
        seen = measure_hue(read_frames(folder / item["path"], None))
        colour = nearest_colour(seen, HUES)
        verdicts.append(
            {
                "seen": colour,
                "right": colour == item["colour"],
                "hue": seen.hue,
                "area": seen.area,
                "purity": seen.purity,
            }
        )
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        known = list(csv.DictReader(file))[: len(items)]
    ruler = [
        nearest_colour(measure_hue(read_frames(folder / row["path"], None)), HUES) == row["colour"]
        for row in known
    ]
    return {
        "verdicts": verdicts,
        "accuracy": sum(v["right"] for v in verdicts) / len(verdicts),
        "ruler": sum(ruler) / len(ruler),
    }


def reconstruct(folder: Path) -> dict[str, Any]:
    """Clips and what the autoencoder makes of them, side by side in one video each."""
    run = _run_folder(folder, "tiny-world")
    assert run is not None
    pipeline = Pipeline.from_pretrained(run)
    shape, vae = pipeline.config.buckets[0], pipeline.load().vae
    manifest = Manifest.read(manifest_path(folder))
    rows = np.flatnonzero(manifest.kept & (manifest.column("num_frames") > shape.num_frames))
    chosen = rows[np.linspace(0, len(rows) - 1, min(RECONSTRUCTED, len(rows))).astype(int)]
    paths, errors = [], []
    for row in chosen.tolist():
        size = (shape.height, shape.width)
        frames = read_frames(manifest.absolute_path(row), range(shape.num_frames), size=size)
        again, error = _through(vae, frames)
        path = folder / "reconstructions" / f"{row:05d}.mp4"
        write_video(path, np.concatenate([frames, again], axis=2), pipeline.config.fps)
        paths.append(str(path.relative_to(folder)))
        errors.append(error)
    psnr = float(10 * np.log10(4 / np.mean(errors)))
    return {"paths": paths, "psnr_db": round(psnr, 2)}


def overview(folder: Path, config: DemoConfig) -> dict[str, Any]:
    """What the data is: some captions, and how often each colour, shape and motion comes."""
    manifest = Manifest.read(manifest_path(folder))
    kept = np.flatnonzero(manifest.kept)
    chosen = kept[np.linspace(0, len(kept) - 1, min(12, len(kept))).astype(int)].tolist()
    result: dict[str, Any] = {
        "clips": [[str(manifest.absolute_path(row)), manifest.text(row)] for row in chosen],
        "frames": int(manifest.column("num_frames")[kept].sum()),
        "counts": {},
    }
    if config.videos is None:
        with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for column in ("colour", "shape", "motion"):
            result["counts"][column] = dict(Counter(row[column] for row in rows).most_common())
    return result


def manifest_path(folder: Path) -> Path:
    return folder / "clips.parquet"


def _data_overrides(folder: Path, config: DemoConfig) -> list[str]:
    overrides = [
        f"data.path={json.dumps(str(manifest_path(folder)))}",
        f"outputs={json.dumps(str(folder / 'outputs'))}",
    ]
    if config.videos is not None:
        overrides.append(f"data.frame_interval={_frame_interval(folder)}")
    return overrides


def _frame_interval(folder: Path) -> int:
    """Thins videos out to about the demo's frame rate, as far as most are long enough."""
    manifest = Manifest.read(manifest_path(folder))
    moving = manifest.kept & (manifest.column("num_frames") > 1)
    if not moving.any():
        raise KinemaError(
            "none of the files is a video", where=str(folder), hint="--videos FOLDER of videos"
        )
    rate = float(np.median(manifest.column("fps")[moving]))
    frames = int(np.quantile(manifest.column("num_frames")[moving], 0.25))
    needed = 17  # of the demo's recipes
    return max(1, min(round(rate / CLIP_FPS), (frames - 1) // needed))


def _train(folder: Path, recipe: str, overrides: list[str], on_done: OnDone) -> dict[str, Any]:
    """Train by a named recipe, going on with the run of an earlier, interrupted demo."""
    checked = load_recipe(recipe, TrainRecipe, overrides)
    earlier = _run_folder(folder, checked.name)
    done = 0

    def on_step(step: int, _: dict[str, Any] | None) -> None:
        nonlocal done
        on_done(step - done)
        done = step

    result = train(checked, Start(load=earlier) if earlier else None, on_step=on_step)
    if not result.finished:
        raise DemoInterruptedError(
            "stopped; run the same command again to continue", where=str(folder)
        )
    log = [json.loads(line) for line in (result.run / "log.jsonl").read_text().splitlines()]
    return {
        "run": str(result.run),
        "steps": result.step,
        "recipe": recipe,
        "log": log,
        "about": _about(checked),
    }


def _about(recipe: TrainRecipe) -> dict[str, Any]:
    (shape, lengths), *_ = recipe.data.buckets.items()
    (frames, (_, batch)), *_ = lengths.items()
    return {"size": shape, "frames": frames, "batch_size": batch, "lr": recipe.optim.lr}


def _run_folder(folder: Path, name: str) -> Path | None:
    """The newest run of that name, if there is one that got as far as its description."""
    found = sorted((folder / "outputs").glob(f"[0-9][0-9][0-9]-{name}"))
    return next((run for run in reversed(found) if (run / "run.json").exists()), None)


def _prompts(folder: Path, config: DemoConfig) -> list[dict[str, Any]]:
    if config.videos is None:
        scenes = held_out_scenes(seed=config.seed, count=config.prompts)
        return [
            {"prompt": caption(s, n), "colour": s.colour, "shape": s.shape, "motion": s.motion}
            for n, s in enumerate(scenes)
        ]
    manifest = Manifest.read(manifest_path(folder))
    captions = list(dict.fromkeys(manifest.text(r) for r in np.flatnonzero(manifest.kept).tolist()))
    return [{"prompt": text} for text in captions[: config.prompts]]


def _through(vae: Autoencoder, frames: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], float]:
    """Reconstructed frames, uint8, and the mean squared error on the scale of [-1, 1]."""
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        again = vae.decode(vae.encode(video), len(frames)).clamp(-1, 1)
    error = float((again - video).square().mean())
    pixels = (again[0].permute(1, 2, 3, 0) + 1).mul(127.5).round().to(torch.uint8)
    return pixels.numpy(), error


def _whole(video: Path) -> bool:
    """Videos and their sidecars appear complete or not at all, the sidecar last."""
    return video.exists() and video.with_suffix(".json").exists()
