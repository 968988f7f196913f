"""Latents worked out beforehand train as the videos themselves do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from typer.testing import CliRunner

from kinema.checkpoint.run import Checkpoint
from kinema.cli.main import app
from kinema.config.errors import ConfigError, KinemaError
from kinema.config.recipe import load_recipe
from kinema.data.latent_cache import LatentCache
from kinema.data.latent_cache_writer import LatentCacheWriter
from kinema.data.manifest import Manifest
from kinema.models.build import build_vae
from kinema.parallel.world import World
from kinema.training.config import TrainRecipe
from kinema.training.encode_latents import (
    encode_latents,
    open_latents,
    vae_key,
    wanted_clips,
)
from kinema.training.run import train
from tests.integration.train_fixtures import smoke, write_clips

ALONE = World(0, 1, torch.device("cpu"))
ONLINE = "task.remember_latents=false"
EXACT = (ONLINE, "max_steps=3")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), count=10)


def encode(*words: object) -> Result:
    words = ("latents", *words)
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=True)


def seeded_vae(recipe: TrainRecipe) -> Any:
    """The autoencoder that `vae_weights: random` stands for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build_vae(recipe.vae).eval()


def final(recipe: TrainRecipe) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(train(recipe, device="cpu").run)
    return load_file(checkpoint.path / "model.safetensors")


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_training_from_latents_equals_training_from_videos(tmp_path: Path) -> None:
    # Of 6 frames, a window of 5 starts at the first: the published rule never takes the last frame.
    manifest = write_clips(tmp_path, count=10, frames=6)
    cache, out, name = tmp_path / "latents", tmp_path / "out", "tiny/smoke-1.0"
    done = encode("encode", name, "vae_weights=random", "--data-path", manifest, "-o", cache,
                  "--dtype", "float32", "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "10 clips encoded" in done.output
    plain = final(smoke(manifest, out, *EXACT, name=name))
    cached = final(smoke(manifest, out, *EXACT, f"latent_cache='{cache}'", name=name))
    assert distance(plain, cached) < 1e-5
    other = final(smoke(manifest, out, *EXACT, "seed=7", f"latent_cache='{cache}'", name=name))
    assert distance(plain, other) > 1e-3


def test_no_video_and_no_autoencoder_is_needed(manifest: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(manifest.parent, folder)
    here, cache = folder / manifest.name, tmp_path / "latents"
    recipe = smoke(here, tmp_path / "out", "max_steps=2")
    encode_latents(recipe, Manifest.read(here), seeded_vae(recipe), cache, ALONE)
    for video in folder.rglob("*.mp4"):
        video.write_bytes(b"gone")
    changed = (ONLINE, "max_steps=2", "vae_weights=null", f"latent_cache='{cache}'", ONLINE)
    assert train(smoke(here, tmp_path / "out", *changed), device="cpu").step == 2


def test_windows_of_a_chunked_autoencoder(tmp_path: Path, manifest: Path) -> None:
    """Cut out of longer latents, a window is what encoding it alone gives."""
    clips = Manifest.read(manifest)
    buckets = {"16x16": {2: [1.0, 4], 4: [[1.0, 0.5], 4]}}
    recipe = load_recipe(_recipe_file(tmp_path, buckets), TrainRecipe)
    vae, cache = seeded_vae(recipe), tmp_path / "latents"
    encode_latents(recipe, clips, vae, cache, ALONE, dtype="float32", whole=True)
    opened = LatentCache.open(
        cache, clips, vae=vae_key(recipe.vae), frame_interval=1, transform="resize_crop"
    )
    assert opened.frames_at(16, 16).tolist() == [6] * len(clips)  # of 7: whole chunks of 2
    from kinema.data.buckets import BucketTable
    from kinema.media.clip import load_clip

    lengths = np.array([0, 2, 4, 6], np.int32)
    assert opened.fits(lengths, 4).tolist() == [False, False, True, True]
    assert opened.fits(lengths, 3).tolist() == [False] * 4  # not whole chunks
    with pytest.raises(KinemaError, match="transform is"):
        LatentCache.open(cache, clips, vae=vae_key(recipe.vae), frame_interval=1, transform="x")
    table = BucketTable.from_config(recipe.data)
    for bucket in table.buckets:
        starts = {opened.start(3, bucket, unit) for unit in (0.0, 0.4, 0.6, 0.999)}
        assert starts == set(range(0, 7 - bucket.frames, 2))
        for start in starts:
            pixels = load_clip(
                clips.absolute_path(3), list(range(start, start + bucket.frames)), (16, 16)
            )
            with torch.no_grad():
                alone = vae.posterior(torch.from_numpy(pixels)[None])
            mean, std = opened.read(3, bucket, start)
            np.testing.assert_allclose(mean, alone.mean[0].numpy(), atol=1e-5)
            np.testing.assert_allclose(std, alone.std[0].numpy(), atol=1e-5)


def _recipe_file(folder: Path, buckets: dict[str, Any]) -> str:
    import yaml

    settings = {"base": "tiny/smoke", "vae": {"micro_frame_size": 2}}
    text = yaml.safe_dump({**settings, "task": {"remember_latents": False}})
    inner = json.dumps(buckets).replace('"1"', "1")
    for number in ("2", "4", "3"):
        inner = inner.replace(f'"{number}":', f"{number}:")
    file = folder / "recipe.yaml"
    file.write_text(text + f"data:\n  buckets: !replace {inner}\n")
    return str(file)


def test_lengths_that_cannot_be_cut_are_refused(tmp_path: Path, manifest: Path) -> None:
    recipe = load_recipe(_recipe_file(tmp_path, {"16x16": {3: [1.0, 4], 4: [1.0, 4]}}), TrainRecipe)
    with pytest.raises(ConfigError, match="windows of 3 frames cannot be cut"):
        wanted_clips(recipe, Manifest.read(manifest))
    with pytest.raises(ConfigError, match="no buckets of 720p"):
        wanted_clips(recipe, Manifest.read(manifest), resolutions=["720p"])


def test_clips_are_encoded_where_the_buckets_may_take_them(tmp_path: Path) -> None:
    buckets = {"16x16": {2: [1.0, 4], 4: [1.0, 4]}, "8x8": {4: [1.0, 4]}}
    recipe = load_recipe(_recipe_file(tmp_path, buckets), TrainRecipe)
    side, names = [16, 16, 8, 16, 16], [f"{i}.mp4" for i in range(5)]
    clips = Manifest.from_columns(
        {"path": names, "text": names, "num_frames": [9, 4, 9, 2, 9], "fps": [24.0] * 5,
         "height": side, "width": side},
        tmp_path,
    ).with_dropped({4: "blurred"})  # fmt: skip
    found = {(c.row, c.height, c.frames) for c in wanted_clips(recipe, clips)}
    # The last frame of a clip is never taken; the third is too small, the fourth too short.
    assert found == {(0, 16, 4), (1, 16, 2), (2, 8, 4)}


def test_several_sizes_are_drawn_by_the_recipe(tmp_path: Path, manifest: Path) -> None:
    """One of several folders for each clip and epoch, by the buckets' probabilities."""
    clips = Manifest.read(manifest)
    buckets = {"16x16": {4: [0.5, 4]}, "8x8": {4: [1.0, 4]}}
    recipe = load_recipe(_recipe_file(tmp_path, buckets), TrainRecipe)
    cache = tmp_path / "latents"
    done = encode_latents(recipe, clips, seeded_vae(recipe), cache, ALONE)
    assert done.clips == {(8, 8): len(clips), (16, 16): len(clips)}
    from dataclasses import replace

    from kinema.training.feed import Feed

    recipe = replace(recipe, latent_cache=str(cache), data=replace(recipe.data, path=str(manifest)))
    with Feed(recipe, clips, ALONE, latents=open_latents(recipe, clips)) as feed:
        seen: set[tuple[int, int]] = set()
        for epoch in range(3):
            for batch in feed.epoch(epoch, 0)[1]:
                assert batch.latents is not None
                mean, std = batch.latents
                assert mean.shape == std.shape
                assert mean.shape[3] == mean.shape[4] == -(-batch.height // 4)
                seen |= {(row, batch.height) for row in batch.rows.tolist()}
    assert len(seen) > 1.5 * len(clips)  # most clips came in both sizes

    # With the larger size alone, clips that are not drawn for it have nowhere to go.
    shutil.rmtree(cache / "latent_8x8")
    about = json.loads((cache / "cache.json").read_text())
    del about["folders"]["latent_8x8"]
    (cache / "cache.json").write_text(json.dumps(about))
    with Feed(recipe, clips, ALONE, latents=open_latents(recipe, clips)) as feed:
        assert {b.height for b in feed.plan.buckets} == {16}
        assert feed.plan.dropped["no latents in the cache"] > 0


def test_goes_on_after_an_interruption_and_leaves_out_what_cannot_be_read(
    tmp_path: Path, manifest: Path
) -> None:
    folder, cache = tmp_path / "clips", tmp_path / "latents"
    shutil.copytree(manifest.parent, folder)
    here = folder / manifest.name
    clips = Manifest.read(here)
    clips.absolute_path(4).write_bytes(b"no video")
    words = ("encode", "tiny/smoke", "vae_weights=random", "--data-path", here, "-o", cache,
             "--clips-per-file", 2, "--device", "cpu")  # fmt: skip
    done = encode(*words)
    assert done.exit_code == 0, done.output
    assert f"{len(clips) - 1} clips encoded, 1 left out" in done.output

    # As after a kill: a file less, no cache.json, and half a file under its temporary name.
    files = sorted((cache / "latent_16x16").glob("0*.safetensors"))
    files[1].unlink()
    (cache / "cache.json").unlink()
    (cache / "latent_16x16" / ".x.1.tmp.safetensors").write_bytes(b"half")
    left = smoke(here, tmp_path / "out", f"latent_cache='{cache}'", ONLINE)
    with pytest.raises(KinemaError, match="not complete"):
        train(left, device="cpu")
    kept = {file.name: file.stat().st_mtime_ns for file in files if file.exists()}
    again = encode(*words)
    assert "2 clips encoded" in again.output or "1 clips encoded" in again.output, again.output
    for name, when in kept.items():
        assert (cache / "latent_16x16" / name).stat().st_mtime_ns == when
    assert train(left, device="cpu").step > 0

    # A file that was cut off later is named, and so are other videos and settings.
    victim = sorted((cache / "latent_16x16").glob("0*.safetensors"))[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-10])
    with pytest.raises(KinemaError, match=f"instead of {len(whole)}"):
        train(left, device="cpu")
    victim.write_bytes(whole)
    with pytest.raises(KinemaError, match=r"vae\.micro_frame_size is 5 in the cache, now 4"):
        train(smoke(here, tmp_path, f"latent_cache='{cache}'", ONLINE, "vae.micro_frame_size=4"))
    other = write_clips(tmp_path / "other", count=6, seed=5)
    with pytest.raises(KinemaError, match="made of other videos"):
        train(smoke(other, tmp_path, f"latent_cache='{cache}'", ONLINE))
    assert encode(*words, "vae.micro_frame_size=4").exit_code == 1


def test_another_process_that_begins_the_same_cache_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".made_from.7.tmp.json").write_text("{")
    for settings in ({"videos": "a"}, {"videos": "a"}):
        LatentCacheWriter(tmp_path, settings)
    with pytest.raises(KinemaError, match="of other videos"):
        LatentCacheWriter(tmp_path, {"videos": "b"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(KinemaError, match=r"not empty and no latent cache.*notes\.txt"):
        LatentCacheWriter(tmp_path / "other", {"videos": "a"})


def test_ranks_share_the_work(tmp_path: Path, manifest: Path) -> None:
    cache = tmp_path / "latents"
    words = ["latents", "encode", "tiny/smoke", "vae_weights=random", "--data-path", str(manifest)]
    words += ["-o", str(cache), "--clips-per-file", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--no-python", str(Path(sys.executable).with_name("kinema")), *words]
    done = subprocess.run(
        command,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    clips = len(Manifest.read(manifest))
    assert f"{clips} clips encoded" in done.stdout
    assert done.stdout.count("clips encoded") == 1
    recipe = smoke(manifest, tmp_path / "out", "max_steps=2", f"latent_cache='{cache}'", ONLINE)
    assert train(recipe, device="cpu").step == 2


def test_latents_of_the_mindspore_port(tmp_path: Path, manifest: Path) -> None:
    """Its layout: [T, C, h, w] before scaling, a file per clip and size."""
    clips, recipe = Manifest.read(manifest), smoke(manifest, tmp_path, name="tiny/smoke-1.0")
    random = np.random.default_rng(0)
    raw = {}
    for size in ("16x16", "8x24"):
        height, width = (int(n) // recipe.vae.spatial_stride for n in size.split("x"))
        for row in range(len(clips) - 1):
            file = tmp_path / "npz" / f"latent_{size}" / Path(clips.path(row)).with_suffix(".npz")
            file.parent.mkdir(parents=True, exist_ok=True)
            shape = (7, recipe.vae.latent_channels, height, width)
            raw[size, row] = random.normal(size=shape).astype(np.float32)
            std = np.full_like(raw[size, row], 0.5)
            np.savez(file, latent_mean=raw[size, row], latent_std=std, fps=24, ori_size=(16, 16))
    cache = tmp_path / "latents"
    done = encode("import", tmp_path / "npz", "tiny/smoke-1.0", "--data-path", manifest,
                  "-o", cache, "--dtype", "float32")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "1 of the manifest have no file" in done.output
    opened = LatentCache.open(
        cache, clips, vae=vae_key(recipe.vae), frame_interval=1, transform="resize_crop"
    )
    assert set(opened.sizes) == {(16, 16), (8, 24)}
    from kinema.data.buckets import BucketTable

    bucket = next(b for b in BucketTable.from_config(recipe.data).buckets if b.frames == 5)
    mean, std = opened.read(2, bucket, 1)
    factor = recipe.vae.scaling_factor  # type: ignore[union-attr]
    np.testing.assert_allclose(mean, raw["16x16", 2][1:6].swapaxes(0, 1) * factor, rtol=1e-6)
    np.testing.assert_allclose(std, 0.5 * factor, rtol=1e-6)
    trained = smoke(manifest, tmp_path / "out", "max_steps=2", f"latent_cache='{cache}'", ONLINE,
                    "vae_weights=null", name="tiny/smoke-1.0")  # fmt: skip
    assert train(trained, device="cpu").step == 2

    (tmp_path / "npz" / "latent_16x16" / Path(clips.path(0)).with_suffix(".npz")).write_bytes(b"x")
    bad = encode("import", tmp_path / "npz", "tiny/smoke-1.0", "--data-path", manifest,
                 "-o", tmp_path / "again")  # fmt: skip
    assert bad.exit_code == 1
    assert isinstance(bad.exception, KinemaError)
