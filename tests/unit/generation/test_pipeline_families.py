"""What must hold for every model that generates: it is one engine that runs them all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.diffusion.config import IDDPMConfig
from kinema.diffusion.process import build_process
from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.noise import initial_noise, step_noise
from kinema.generation.parts import Parts
from kinema.generation.pipeline import Pipeline
from kinema.models.transformer import ClipShape
from kinema.parallel.compile import compile_blocks
from tests.unit.generation.tiny import (
    FAMILIES,
    prompts_of,
    tiny_config,
    tiny_parts,
    tiny_pipeline,
)

CPU = torch.device("cpu")
every_family = pytest.mark.parametrize("family", FAMILIES)


def close(a: Tensor, b: Tensor) -> bool:
    """Within 1e-5 of the largest value (random networks under IDDPM reach into the hundreds)."""
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


@every_family
def test_batched_is_alone_and_seeds_differ(family: str) -> None:
    pipeline = tiny_pipeline(family)
    requests = [pipeline.request(p, seed=i, sample=i % 2) for i, p in enumerate(prompts_of(family))]
    together = pipeline.latents(requests)
    for row, request in enumerate(requests):
        assert close(together[row], pipeline.latents([request])[0])
    again = pipeline.latents([requests[0]])[0]
    assert torch.equal(again, pipeline.latents([requests[0]])[0])
    assert not close(again, pipeline.latents([replace(requests[0], seed=9)])[0])
    assert not close(again, pipeline.latents([replace(requests[0], sample=9)])[0])


@every_family
def test_prompt_and_guidance_change_the_video(family: str) -> None:
    pipeline = tiny_pipeline(family)
    one, other, _ = prompts_of(family)

    def latents(prompt: str, scale: float) -> Tensor:
        return pipeline.latents([pipeline.request(prompt, seed=1, cfg_scale=scale)])

    assert not close(latents(one, 4.0), latents(other, 4.0))
    assert not close(latents(one, 4.0), latents(one, 1.0))
    clips = [next(pipeline.generate_all([pipeline.request(p, seed=1)])) for p in (one, other)]
    assert not np.array_equal(clips[0].frames, clips[1].frames)


@every_family
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_one_pass_is_all(family: str, scale: float) -> None:
    """At 0 the prompt does not matter: exactly the unconditional pass. At 1 only it does."""
    config = tiny_config(family)
    parts = tiny_parts(config)
    rows: list[int] = []
    parts.model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    pipeline = Pipeline(config, parts, device="cpu")
    request = pipeline.request(prompts_of(family)[0], seed=3, cfg_scale=scale)
    found = pipeline.latents([request])
    assert rows == [1] * request.num_sampling_steps
    assert torch.equal(found, by_hand(config, parts, request, conditional=scale == 1.0))
    if scale == 0.0 and config.text.config.type == "classes":
        other = replace(request, prompt=prompts_of(family)[1])
        assert torch.equal(found, pipeline.latents([other]))


@torch.no_grad()
def by_hand(
    config: PipelineConfig, parts: Parts, request: GenerateRequest, *, conditional: bool
) -> Tensor:
    """Sampling written out, with features as they come instead of prepared text."""
    model, process = parts.model, build_process(config.diffusion)
    features = parts.text.encode([request.prompt])
    text = features.y
    if not conditional:
        text = model.null_text(1)
        if features.mask is not None:
            text = text[:, :, : features.mask.shape[1]]
    size = config.vae.config.latent_size(request.num_frames, request.height, request.width)
    shape = (config.model.in_channels, *size)
    fps = torch.tensor([request.fps if request.num_frames > 1 else 120.0])
    height, width = torch.tensor([float(request.height)]), torch.tensor([float(request.width)])
    clip = ClipShape(fps, height, width, torch.tensor([float(request.num_frames)]))

    def network(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        return model.predict(x, t, text, mask=features.mask, x_mask=x_mask, shape=clip)

    return process.sample(
        network,
        initial_noise(request.seed, request.sample, shape)[None],
        process.sampling_timesteps(
            request.num_sampling_steps,
            latent_frames=torch.tensor([float(size[0])]),
            height=height,
            width=width,
        ),
        noise=step_noise([request], 0, shape, CPU),
    )


@pytest.mark.parametrize("family", ["stdit3", "stdit2", "stdit", "pixart"])
def test_a_negative_prompt_takes_the_place_of_the_stand_in(family: str) -> None:
    pipeline = tiny_pipeline(family)

    def latents(negative: str | None, scale: float) -> Tensor:
        request = pipeline.request("a red kite", seed=1, cfg_scale=scale, negative_prompt=negative)
        return pipeline.latents([request])[0]

    assert not close(latents("a boat at night", 4.0), latents(None, 4.0))
    # Away from itself leads nowhere: as without guidance, up to rounding.
    away = latents("a red kite", 4.0)
    alone = pipeline.latents([pipeline.request("a red kite", seed=1, cfg_scale=1.0)])[0]
    assert float((away - alone).abs().max()) <= 1e-4 * max(1.0, float(alone.abs().max()))
    # Of another length than the prompt, alone: exactly the pass for that text.
    other = pipeline.request("a boat at night", seed=1, cfg_scale=1.0)
    assert torch.equal(latents("a boat at night", 0.0), pipeline.latents([other])[0])
    # Rows with and without one share a batch.
    mixed = [
        pipeline.request("a red kite", seed=1, negative_prompt=n) for n in ("a boat at night", None)
    ]
    for row, request in zip(pipeline.latents(mixed), mixed, strict=True):
        assert close(row, pipeline.latents([request])[0])


@pytest.mark.parametrize("family", ["stdit2", "stdit", "pixart", "dit", "latte"])
def test_the_sampler_can_be_another_for_a_request(family: str) -> None:
    prompt = prompts_of(family)[0]
    pipeline = tiny_pipeline(family)
    usual = pipeline.request(prompt, seed=1, num_sampling_steps=4)
    solver = pipeline.request(prompt, seed=1, num_sampling_steps=4, sampler="dpm-solver")
    assert not close(pipeline.latents([usual]), pipeline.latents([solver]))
    # It is the sampler of a checkpoint that names it.
    named = tiny_pipeline(family, sampler="dpm-solver")
    same = named.request(prompt, seed=1, num_sampling_steps=4)
    assert torch.equal(named.latents([same]), pipeline.latents([solver]))
    assert named.request(prompt).num_sampling_steps == 3
    assert pipeline.request(prompt, sampler="dpm-solver").num_sampling_steps == 20
    clips = list(pipeline.generate_all([usual, solver], batch_size=2))
    assert [c.record["batch_size"] for c in clips] == [1, 1]


def test_rectified_flow_has_one_sampler() -> None:
    with pytest.raises(KinemaError, match="dpm-solver"):
        tiny_pipeline().request("a kite", sampler="dpm-solver")


def test_iddpm_draws_by_seed_sample_segment_and_step() -> None:
    pipeline = tiny_pipeline("stdit2")
    request = pipeline.request("a", seed=4)
    shape = (4, 6, 8, 8)
    noise = step_noise([request], 0, shape, CPU)
    assert torch.equal(noise(2), step_noise([request], 0, shape, CPU)(2))
    others = [
        noise(1),
        step_noise([request], 1, shape, CPU)(2),
        step_noise([replace(request, seed=5)], 0, shape, CPU)(2),
        step_noise([replace(request, sample=1)], 0, shape, CPU)(2),
        initial_noise(4, 0, shape)[None],
    ]
    for other in others:
        assert float((noise(2) - other).abs().max()) > 0.5
    both = step_noise([request, replace(request, seed=5)], 0, shape, CPU)(2)
    assert torch.equal(both[:1], noise(2))


@every_family
def test_a_pipelines_parts_must_fit_together(family: str) -> None:
    config = tiny_config(family)
    with pytest.raises(ValueError, match="channels"):
        replace(config, model=replace(config.model, in_channels=8))
    if isinstance(config.diffusion, IDDPMConfig):
        with pytest.raises(ValueError, match="pred_sigma"):
            replace(config, model=replace(config.model, pred_sigma=False))
    other = tiny_config("dit" if family in ("stdit3", "stdit2", "stdit", "pixart") else "stdit3")
    with pytest.raises(ValueError, match="model"):
        replace(config, text=other.text)


@every_family
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_half_precision_weights(family: str, dtype: str) -> None:
    config = tiny_config(family)
    prompt = prompts_of(family)[0]
    exact = Pipeline(config, tiny_parts(config), device="cpu")
    request = exact.request(prompt, seed=1, cfg_scale=1.0, num_sampling_steps=2)
    parts = tiny_parts(config)
    half = Pipeline(config, parts, device="cpu", dtype=dtype)
    rounded, full = half.latents([request]), exact.latents([request])
    assert rounded.dtype == torch.float32
    assert rounded.isfinite().all()
    linear = parts.model.get_parameter("final_layer.linear.weight")
    assert linear.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert 0 < float((rounded - full).norm() / full.norm()) < 0.2
    assert next(half.generate_all([request])).frames.std() > 0


@every_family
def test_compiled_blocks_make_the_same_video(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def eagerly(model: nn.Module) -> None:
        compiled.extend(compile_blocks(model, backend="eager"))  # traced, not generated

    monkeypatch.setattr("kinema.parallel.compile.compile_blocks", eagerly)
    config = tiny_config(family)
    prompt = prompts_of(family)[0]
    plain = Pipeline(config, tiny_parts(config), device="cpu")
    fast = Pipeline(config, tiny_parts(config), device="cpu", compile=True)
    request = plain.request(prompt, seed=1, num_sampling_steps=2)
    assert close(fast.latents([request]), plain.latents([request]))
    assert len(compiled) == (4 if family == "stdit3" else 2)
