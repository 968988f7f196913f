"""Predicted memory against memory measured, and what the prediction depends on."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kinema.config.recipe import load_recipe
from kinema.data.buckets import Bucket
from kinema.diffusion.process import build_process
from kinema.generation.live_bytes import peak_bytes
from kinema.generation.residency import empty_vae
from kinema.models.transformer import ClipShape, Transformer
from kinema.models.vae import VideoVAE
from kinema.training import step_bytes
from kinema.training.config import TrainRecipe
from kinema.training.memory import predict, sharing_ranks
from kinema.training.parts import build_model
from kinema.training.step_bytes import StepBytes

CLIP = Bucket(0, "128x128", 17, 1.0, 128, 128, 8)
SMALL = ["task.remember_latents=false", "text.max_tokens=16", "model.model_max_length=16"]


def recipe_of(*overrides: str, name: str = "tiny/world") -> TrainRecipe:
    return load_recipe(name, TrainRecipe, [*(SMALL if name == "tiny/world" else []), *overrides])


def measured_step(recipe: TrainRecipe, bucket: Bucket, clips: int) -> int:
    """Most bytes that the CPU's allocator had handed out in a real step beyond those before it,
    from the profiler's own record of every allocation."""
    assert recipe.diffusion is not None
    assert recipe.model is not None
    assert recipe.text is not None
    torch.manual_seed(0)
    model = build_model(recipe).train()
    assert isinstance(model, Transformer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    process = build_process(recipe.diffusion)
    size = recipe.vae.latent_size(bucket.frames, bucket.height, bucket.width)
    length = recipe.text.max_tokens
    text = torch.randn(clips, 1, length, getattr(recipe.text, "dim", 1))
    mask = torch.ones(clips, length, dtype=torch.bool)
    half = recipe.precision == "bf16"

    def step() -> None:
        x0 = torch.randn(clips, recipe.vae.latent_channels, *size)
        noise, t = torch.randn_like(x0), torch.full((clips,), 500.0)
        noised = torch.ones(clips, size[0], dtype=torch.bool)
        told = torch.full((clips,), 24.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = model.drop_text(text, torch.zeros(clips, dtype=torch.bool))
            predicted = model.predict(
                process.add_noise(x0, noise, t, noised),
                t,
                y,
                mask=mask,
                x_mask=noised,
                shape=ClipShape(fps=told, height=told, width=told, num_frames=told),
            )
            terms = process.loss_terms(predicted, x0, noise, t, mask=noised)
            loss = sum(term.mean() for term in terms.values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()

    return measured(step)


def measured(step: object) -> int:
    assert callable(step)
    step()  # what is made once is made now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 10e6, "large enough that rounding plays no part"
    return peak


@pytest.mark.parametrize(
    "overrides",
    [
        ["recompute=none"],
        ["recompute=full"],
        ["recompute=selective"],
        ["recompute=full", "recompute_every=2"],
        ["recompute=none", "precision=bf16"],
        ["recompute=full", "precision=bf16"],
        ["recompute=none", "freeze=[spatial_blocks]"],
    ],
    ids=" ".join,
)
def test_a_step_takes_what_was_predicted(overrides: list[str]) -> None:
    recipe = recipe_of("model.depth=3", *overrides)
    counted = StepBytes(recipe, sharded=False, device="cpu")
    assert counted.model(CLIP, 2) == pytest.approx(measured_step(recipe, CLIP, 2), rel=0.1)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_depth_is_extrapolated_exactly(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("model.depth=7", f"recompute={recompute}", "precision=bf16")
    short = StepBytes(recipe, sharded=True, device="cuda").model(CLIP, 2)
    monkeypatch.setattr(step_bytes, "FEW", 100)
    whole = StepBytes(recipe, sharded=True, device="cuda").model(CLIP, 2)
    assert short == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("name", ["tiny/world", "tiny/smoke-1.0"])
@pytest.mark.parametrize("clips", [1, 6])
def test_encoding_is_the_sum_of_its_parts(name: str, clips: int) -> None:
    """Against the whole of `encode`, run without computing; a CPU's convolutions take scratch
    memory that a GPU's do not, so the allocator would not tell."""
    recipe = recipe_of("precision=fp32", "task.remember_latents=false", name=name)
    video = torch.empty(clips, 3, 34, 128, 128, device="meta")
    size = recipe.vae.latent_size(34, 128, 128)
    temporal = torch.empty(clips, recipe.vae.latent_channels, *size, device="meta")
    vae = empty_vae(recipe.vae, None)
    noise: Any = temporal
    if isinstance(vae, VideoVAE):
        noise = (torch.empty(clips, 4, 34, *size[1:], device="meta"), temporal)
    whole = peak_bytes(lambda: vae.encode(video, noise=noise))
    whole += sum(n.numel() * 4 for n in (noise if isinstance(noise, tuple) else [noise]))
    counted = StepBytes(recipe, sharded=False, device="cpu")
    assert counted.encode(replace(CLIP, frames=34), clips) == pytest.approx(whole, rel=0.1)


def fixed(*overrides: str, ranks: int = 8, local: int = 4) -> dict[str, int]:
    recipe = recipe_of("precision=bf16", *overrides)
    return asdict(predict(recipe, world_size=ranks, local_size=local, device="cpu").fixed)


def test_sharding_divides_what_it_should() -> None:
    """Counted from a real model's tensors, not from the formula."""
    recipe = recipe_of()
    model = build_model(recipe)
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    whole = fixed()
    assert whole["weights"] == 4 * weights + buffers
    assert whole["gradients"] == 4 * trained
    assert whole["optimizer"] == 8 * trained
    assert whole["average"] == 4 * weights + buffers
    assert whole["working"] == 0
    two = fixed("parallel={shard: zero2}")
    assert two["working"] == 2 * weights
    three = fixed("parallel={shard: zero3}")
    assert three["working"] < two["working"]
    for part in ("weights", "gradients", "optimizer", "average"):
        # Small parameters do not divide; most do.
        assert two[part] == three[part] == pytest.approx(whole[part] / 8, rel=0.1)
    node = fixed("parallel={shard: zero2, shard_over: node}")
    assert node["optimizer"] == pytest.approx(whole["optimizer"] / 4, rel=0.1)
    assert fixed("ema_decay=null")["average"] == 0


def test_ranks_that_share_weights() -> None:
    for text, ranks in (("{}", 1), ("{shard: zero2}", 16), ("{shard: zero3, shard_over: node}", 8),
                        ("{shard: zero2, shard_over: 4}", 4)):  # fmt: skip
        config = recipe_of(f"parallel={text}").parallel
        assert sharing_ranks(config, 16, 8) == ranks


def test_frozen_networks_count_where_they_run() -> None:
    name = "opensora-1.2/stage1"
    with_all = predict(recipe_of(name=name), world_size=8, local_size=8).fixed
    assert with_all.text_encoder == pytest.approx(9.5e9, rel=0.03), "T5-XXL's encoder in bf16"
    assert with_all.autoencoder == pytest.approx(4 * 393e6, rel=0.05)
    cached = ["latent_cache=there", "text_cache=there"]
    without = predict(recipe_of(*cached, name=name), world_size=8, local_size=8)
    assert without.fixed.text_encoder == without.fixed.autoencoder == 0
    clip = Bucket(0, "144p", 51, 1.0, 144, 256, 8)
    whole = predict(recipe_of(name=name), world_size=8, local_size=8)
    pixels, latents = 8 * 3 * 51 * 144 * 256 * 4, 8 * 2 * 4 * 15 * 18 * 32 * 4
    assert whole.of_step(clip, 8) - without.of_step(clip, 8) == pixels - latents
    assert whole.of(clip, 8) == whole.fixed.total + whole.of_step(clip, 8)


def test_sharing_a_clip_takes_less_on_each_rank() -> None:
    recipe = recipe_of("model.depth=3", "parallel={sequence: 2, sequence_tokens: 100}")
    plan = predict(recipe, world_size=2, local_size=2, device="cpu")
    alone = plan.of_step(CLIP, 2, degree=1)
    shared = plan.of_step(CLIP, 2)  # 5 x 16 x 16 tokens: two ranks
    assert shared == plan.of_step(CLIP, 2, degree=2)
    assert alone / 2 < shared < 0.75 * alone  # 3 of 5 latent frames, and what is exchanged


@pytest.mark.parametrize("room", [0.5e9, 3.3e9])
def test_most_clips_is_the_most(room: float) -> None:
    plan = predict(recipe_of("model.depth=4"), world_size=1, local_size=1, device="cpu")
    available = plan.fixed.total + int(room)
    most = plan.most_clips(CLIP, available)
    assert plan.needed(CLIP, most) <= available < plan.needed(CLIP, most + 1 + most // 40)
    assert plan.most_clips(CLIP, plan.fixed.total) == 0


def test_an_autoencoder_in_training_has_a_prediction() -> None:
    plan = predict(recipe_of(name="tiny/vae"), world_size=1, local_size=1, device="cpu")
    small, large = (plan.of_step(replace(CLIP, frames=9), n) for n in (2, 8))
    assert 3 < large / small < 4.1
    assert plan.fixed.text_encoder == plan.fixed.autoencoder == 0


def test_sizes_of_one_resolution_follow_from_the_first() -> None:
    recipe = recipe_of("model.depth=3", "vae.micro_frame_size=17")
    wide = replace(CLIP, height=96, width=160)
    own = StepBytes(recipe, sharded=False, device="cpu")
    after = StepBytes(recipe, sharded=False, device="cpu")
    after.model(CLIP, 2)
    assert after.model(wide, 2) == pytest.approx(own.model(wide, 2), rel=0.02)
    assert after.model(wide, 2) != after.model(CLIP, 2)
    after.encode(CLIP, 2)
    assert after.encode(wide, 2) == pytest.approx(own.encode(wide, 2), rel=0.02)
    far = replace(CLIP, height=64, width=64)
    assert after.model(far, 2) == own.model(replace(far, resolution="other"), 2)
