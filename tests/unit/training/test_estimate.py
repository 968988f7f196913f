"""Steps, time, links and batch sizes of a plan, against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kinema.config.errors import KinemaError
from kinema.config.recipe import load_recipe
from kinema.data.like import DATA_SETS, manifest_like
from kinema.data.manifest import Manifest
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost
from kinema.training.estimate import (
    DECODE_RATE,
    Cluster,
    Estimate,
    communication,
    estimate,
    order_of,
    published_steps,
)
from kinema.training.find_batch_size import search
from kinema.training.fit import (
    LengthFit,
    as_yaml,
    equal_batches,
    fit,
    recompute_choices,
    sharing_that_fits,
    with_batches,
)
from kinema.training.gpus import GPUS, find_gpu
from kinema.training.memory import predict

SMALL = [
    "task.remember_latents=false",
    'data.buckets=!replace {"64x64": {9: [1.0, 4], 17: [1.0, 3]}, "32x32": {9: [1.0, 5]}}',
]
H100 = GPUS["h100"]


def recipe_of(*overrides: str) -> TrainRecipe:
    return load_recipe("tiny/world", TrainRecipe, [*SMALL, *overrides])


def clips_of(long: int, short: int, small: int) -> Manifest:
    """Clips of 20 and of 10 frames of 128x64, and of 10 frames of 32x32."""
    frames = np.repeat([20, 10, 10], [long, short, small])
    height = np.repeat([64, 64, 32], [long, short, small])
    width = np.repeat([128, 128, 32], [long, short, small])
    names = ["clip.mp4"] * len(frames)
    return Manifest.from_columns(
        {"path": names, "text": names, "num_frames": frames, "height": height, "width": width,
         "fps": np.full(len(frames), 24.0)},
        ".",
    )  # fmt: skip


def estimated(recipe: TrainRecipe, clips: Manifest, cluster: Cluster, **given: float) -> Estimate:
    order = order_of(recipe, clips, cluster.gpus)
    return estimate(recipe, clips, order, cluster, **given)  # type: ignore[arg-type]


def test_the_originals_rule_drops_what_does_not_fill() -> None:
    # 10 // 3 + 9 // 4 + 11 // 5 = 3 + 2 + 2 full micro-batches, 7 // 2 ranks.
    order = order_of(recipe_of(), clips_of(10, 9, 11), 2)
    assert published_steps(order) == 3
    # Ours keeps every clip: 4 + 3 + 3 micro-batches.
    assert order.epoch(0).num_steps == 5
    assert published_steps(order_of(recipe_of("accumulation=3"), clips_of(10, 9, 11), 2)) == 1
    # Two ranks to a clip of 17 or 9 frames of 64x64 (5 and 3 latent frames): 3 * 2 + 2 * 2 + 2.
    shared = recipe_of("parallel={sequence: 2, sequence_tokens: 100}")
    assert published_steps(order_of(shared, clips_of(10, 9, 11), 4)) == 3


def test_time_is_the_slowest_ranks_work_at_the_efficiency() -> None:
    recipe, clips = recipe_of(), clips_of(8, 0, 0)
    found = estimated(recipe, clips, Cluster(H100, 4), efficiency=0.25, epochs=3)
    bucket = next(b for b in order_of(recipe, clips, 4).table.buckets if b.frames == 17)
    flops = 2 * bucket_cost(recipe)(bucket)  # 2 clips on each of 4 ranks, one step
    assert found.plan.steps_per_epoch == 1
    assert found.step_seconds == pytest.approx(flops / (0.25 * 989.4e12))
    assert found.steps == 3
    assert found.gpu_hours == pytest.approx(3 * 4 * found.step_seconds / 3600)
    assert found.days == pytest.approx(3 * found.step_seconds / 86400)
    # Uneven: 9 clips on 4 ranks are 3 + 2 + 2 + 2, and all wait for the 3.
    uneven = estimated(recipe, clips_of(9, 0, 0), Cluster(H100, 4), efficiency=0.25)
    assert uneven.step_seconds == pytest.approx(found.step_seconds * 3 / 2)
    stopped = estimated(recipe_of("max_steps=2"), clips, Cluster(H100, 4), epochs=3)
    assert stopped.steps == 2


def test_decoding_counts_the_pixels_of_the_sources() -> None:
    clips = clips_of(8, 0, 4)
    found = estimated(recipe_of(), clips, Cluster(H100, 2, per_node=1))
    pixels = 8 * 17 * 128 * 64 + 4 * 9 * 32 * 32
    seconds = found.step_seconds * found.plan.steps_per_epoch
    assert found.decode_cores == pytest.approx(pixels / seconds / DECODE_RATE / 2)
    assert found.decoded_per_s == pytest.approx(12 / seconds)
    cached = estimated(recipe_of("latent_cache=there"), clips, Cluster(H100, 2))
    assert cached.decode_cores == cached.decoded_per_s == cached.cached_latents == 0


def test_caches_save_what_they_replace() -> None:
    recipe, clips = recipe_of(), clips_of(8, 0, 0)
    cluster = Cluster(H100, 1)
    found = estimated(recipe, clips, cluster)
    without = estimated(recipe_of("latent_cache=there"), clips, cluster)
    assert found.cached_latents > 0
    assert found.epoch_gpu_hours - without.epoch_gpu_hours == pytest.approx(found.cached_latents)
    assert found.cached_text == 0, "words without an encoder"


def test_what_ranks_send() -> None:
    clips = clips_of(24, 24, 24)
    million = 10**6

    def sent(text: str, gpus: int = 16) -> tuple[float, float, float]:
        recipe = recipe_of(f"parallel={text}", "precision=bf16")
        plan = estimated(recipe, clips, Cluster(H100, gpus)).plan
        found = communication(recipe, plan, Cluster(H100, gpus), 2 * million, million)
        return found.weights_bytes, found.sequence_bytes, found.seconds

    assert sent("{}", 1) == (0, 0, 0)
    whole, _, seconds = sent("{}")
    assert whole == pytest.approx(2 * 15 / 16 * 4 * million)
    assert seconds == pytest.approx(whole / 50e9)
    within, _, seconds = sent("{}", 8)
    assert seconds == pytest.approx(within / 450e9), "one machine: its own links"
    two, _, _ = sent("{shard: zero2}")
    assert two == pytest.approx(15 / 16 * (2 * 2 * million + 4 * million))
    three, _, _ = sent("{shard: zero3}")
    assert three - two == pytest.approx(15 / 16 * 2 * 2 * million)
    hybrid, _, seconds = sent("{shard: zero2, shard_over: node}")
    inside, across = 7 / 8 * (2 * 2 * million + 4 * million), 2 * 1 / 2 * 4 * million / 8
    assert hybrid == pytest.approx(inside + across)
    assert seconds == pytest.approx(inside / 450e9 + across / 50e9)
    _, shared, _ = sent("{sequence: 2, sequence_tokens: 100}")
    assert shared > 0


def test_a_checkpoint_is_weights_average_and_two_moments() -> None:
    recipe, clips = recipe_of(), clips_of(8, 0, 0)
    from kinema.training.parts import build_model

    model = build_model(recipe)
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = estimated(recipe, clips, Cluster(H100, 1))
    assert found.checkpoint_bytes == 4 * (2 * weights + 2 * trained)


@pytest.mark.parametrize("name", ["H100", "nvidia-a100-80", "A100_40", "4090"])
def test_gpus_are_found_by_name(name: str) -> None:
    assert find_gpu(name).memory > 20 * 2**30


def test_an_unknown_gpu_is_refused_with_the_list() -> None:
    with pytest.raises(KinemaError, match=r"(?s)'h10'.*did you mean h100.*b200"):
        find_gpu("h10")


@pytest.mark.parametrize("name", DATA_SETS)
def test_generated_clips_have_what_is_known_of_the_data(name: str) -> None:
    clips = manifest_like(name, scale=0.01)
    frames, rows = clips.column("num_frames"), clips.column("height") * clips.column("width")
    openvid = slice(0, 10_200)
    assert len(clips) == 10_200 + (3300 if name.endswith("miradata") else 0)
    assert frames[openvid].mean() / 30 == pytest.approx(7.4, rel=0.2)
    assert (rows[openvid] >= 1080 * 1440).mean() == pytest.approx(433 / 1020, abs=0.03)
    if name.endswith("miradata"):
        assert frames[10_200:].mean() / 30 == pytest.approx(72.1, rel=0.1)
    with pytest.raises(KinemaError, match="one of openvid"):
        manifest_like("imagenet")


def _length(most: int, cost: float, work: float, useful: int = 10**6) -> LengthFit:
    bucket = order_of(recipe_of(), clips_of(2, 0, 0), 1).table.buckets[0]
    bucket = replace(bucket, frames=int(cost))
    return LengthFit(bucket, 4, 1, 0, False, most, useful, cost, work)


def test_equal_batches_cost_alike_and_fit() -> None:
    lengths = [_length(100, 1, 50), _length(40, 3, 50), _length(9, 10, 50), _length(0, 40, 5)]
    found = equal_batches(lengths)
    assert {frames: n for (_, frames), n in found.items()} == {1: 90, 3: 30, 10: 9}
    # A bucket of little work that can hold little holds no other down.
    little = [*lengths[:3], _length(1, 2, 1)]
    assert {f: n for (_, f), n in equal_batches(little).items()} == {1: 90, 3: 30, 10: 9, 2: 1}
    # No more than a rank ever gets.
    few = [_length(100, 1, 50, useful=7), *lengths[1:3]]
    assert {f: n for (_, f), n in equal_batches(few).items()}[1] == 7
    assert equal_batches([_length(0, 1, 1)]) == {}


def test_suggested_lines_read_back(tmp_path: object) -> None:
    recipe = recipe_of()
    changed = with_batches(recipe, {("64x64", 9): 11, ("32x32", 9): 6})
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: tiny/world\n{as_yaml(changed)}\n")
    read = load_recipe(str(file), TrainRecipe).data.buckets
    assert read == changed.data.buckets
    assert read["64x64"] == {9: (1.0, 11), 17: (1.0, 3)}


def test_what_fits_a_small_gpu() -> None:
    recipe, clips = recipe_of("model.depth=2"), clips_of(40, 40, 40)
    order = order_of(recipe, clips, 2)
    memory = predict(recipe, world_size=2, local_size=2)
    one = min(memory.needed(b, 1) for b in order.table.buckets if b.frames == 17)
    available = one + 2**20
    lengths = fit(recipe, order, memory, available)
    by_frames = {(x.bucket.resolution, x.bucket.frames): x for x in lengths}
    assert not by_frames["64x64", 17].fits
    assert by_frames["64x64", 17].most == 1
    assert by_frames["32x32", 9].fits
    work = sum(x.work for x in lengths)
    assert work == pytest.approx(order.epoch(0).flops)
    choices = recompute_choices(recipe, order, lengths, available, world_size=2, local_size=2)
    assert [c.kind for c in choices] == ["none", "selective", "full"]
    assert choices[0].flops == 1.0
    assert 1 < choices[1].flops < choices[2].flops < 4 / 3 + 1e-6
    assert choices[0].needed > choices[2].needed
    assert not choices[0].fits
    assert not any(x.encodes for x in lengths)
    tight = one - int(0.3 * (one - memory.fixed.total))
    assert sharing_that_fits(by_frames["64x64", 17], memory, tight) == 2
    assert sharing_that_fits(by_frames["64x64", 17], memory, memory.fixed.total) is None


@pytest.mark.parametrize("most", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("guess", [1, 6, 300])
def test_the_search_ends_near_the_most(most: int, guess: int) -> None:
    tried = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= most

    found = search(fits, guess, 10**6)
    assert found <= most
    assert most - found <= max(0, 0.02 * most)
    assert len(tried) < 25
    assert search(fits, guess, 5) == min(most, 5)
