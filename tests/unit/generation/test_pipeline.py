from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.generation.noise import initial_noise
from kinema.generation.pipeline import Pipeline
from tests.unit.generation.tiny import tiny_config, tiny_parts, tiny_pipeline, write_run


def test_the_same_seed_gives_the_same_video_and_another_does_not() -> None:
    pipeline = tiny_pipeline()
    one, same, other = (pipeline.generate("a kite", seed=s).frames for s in (1, 1, 2))
    assert one.shape == (17, 32, 32, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_noise_depends_on_seed_and_sample_alone() -> None:
    shape = (4, 5, 8, 8)
    first = initial_noise(7, 0, shape)
    torch.manual_seed(99)
    assert torch.equal(first, initial_noise(7, 0, shape))
    assert not torch.equal(first, initial_noise(7, 1, shape))
    assert not torch.equal(first, initial_noise(8, 0, shape))
    large = initial_noise(7, 0, (4, 40, 40, 40))
    assert abs(float(large.mean())) < 0.01
    assert abs(float(large.std()) - 1) < 0.01


def test_batched_is_alone() -> None:
    pipeline = tiny_pipeline()
    prompts = ("a red kite over the sea", "x", "two words here")
    requests = [pipeline.request(p, seed=i, sample=i % 2) for i, p in enumerate(prompts)]
    together = pipeline.latents(requests)
    for row, request in enumerate(requests):
        alone = pipeline.latents([request])[0]
        assert (together[row] - alone).abs().max() <= 1e-5
    clips = list(pipeline.generate_all(requests, batch_size=3))
    singles = list(pipeline.generate_all(requests, batch_size=1))
    for batched, single in zip(clips, singles, strict=True):
        assert batched.request == single.request
        assert np.abs(batched.frames.astype(int) - single.frames).max() <= 1


def test_requests_of_different_shapes_never_share_a_batch() -> None:
    pipeline = tiny_pipeline()
    video, image = pipeline.request("a"), pipeline.request("b", num_frames=1)
    clips = list(pipeline.generate_all([video, image, video], batch_size=4))
    assert [len(c.frames) for c in clips] == [17, 1, 17]
    assert [c.record["batch_size"] for c in clips] == [1, 1, 1]


def test_prompt_and_guidance_matter() -> None:
    pipeline = tiny_pipeline()

    def latents(prompt: str, scale: float) -> torch.Tensor:
        return pipeline.latents([pipeline.request(prompt, seed=1, cfg_scale=scale)])

    base = latents("a kite", 4.0)
    assert (base - latents("a boat", 4.0)).abs().max() > 1e-4
    assert (base - latents("a kite", 1.0)).abs().max() > 1e-4


def test_guidance_is_one_forward_of_twice_the_batch_and_none_at_scale_one() -> None:
    config = tiny_config()
    parts = tiny_parts(config)
    batches: list[int] = []
    parts.model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    pipeline = Pipeline(config, parts, device="cpu")
    pipeline.latents([pipeline.request("a", num_sampling_steps=2)])
    assert batches == [2, 2]
    batches.clear()
    pipeline.latents([pipeline.request("a", num_sampling_steps=2, cfg_scale=1.0)])
    assert batches == [1, 1]


def test_guidance_follows_its_formula() -> None:
    """v = uncond + scale (cond - uncond), with the learned stand-in as the empty caption."""
    config = tiny_config()
    parts = tiny_parts(config)
    pipeline = Pipeline(config, parts, device="cpu")
    request = pipeline.request("a red kite", seed=3, num_sampling_steps=1, cfg_scale=2.5)
    z = initial_noise(3, 0, (4, 5, 8, 8))[None]
    text = parts.text.encode(["a red kite"])
    rest = {
        "mask": text.mask,
        "fps": torch.tensor([8.0]),
        "height": torch.tensor([32.0]),
        "width": torch.tensor([32.0]),
    }
    with torch.no_grad():
        t = torch.tensor([1000.0])
        cond = parts.model(z, t, text.y, **rest)[:, :4]
        uncond = parts.model(z, t, parts.model.null_text(1)[:, :, : text.y.shape[2]], **rest)[:, :4]
    expected = z + uncond + 2.5 * (cond - uncond)
    assert (pipeline.latents([request]) - expected).abs().max() < 1e-4


def test_progress_counts_every_step_of_every_video() -> None:
    pipeline = tiny_pipeline()
    moved: list[int] = []
    requests = [pipeline.request("a", seed=s) for s in range(3)]
    list(pipeline.generate_all(requests, batch_size=2, on_step=moved.append))
    assert sum(moved) == 3 * 3


def test_defaults_are_those_of_the_checkpoint() -> None:
    request = tiny_pipeline().request("a")
    assert (request.width, request.height, request.num_frames) == (32, 32, 17)
    assert (request.fps, request.num_sampling_steps, request.cfg_scale) == (8.0, 3, 4.0)
    assert tiny_pipeline().request("a", seconds=4).num_frames == 34


def test_contradictions_are_refused() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(KinemaError, match="not both"):
        pipeline.request("a", seconds=2, num_frames=17)
    with pytest.raises(KinemaError, match="together"):
        pipeline.request("a", width=32)
    with pytest.raises(KinemaError, match=r"'strenght'(.|\n)*edit_strength"):
        pipeline.request("a", strenght=0.3)  # type: ignore[call-arg]
    with pytest.raises(KinemaError, match="dtype"):
        Pipeline(pipeline.config, pipeline.load(), dtype="fp8")
    with pytest.raises(KinemaError, match="batch size is 0"):
        next(pipeline.generate_all([pipeline.request("a")], batch_size=0))


@pytest.mark.parametrize("offload", ["none", "phase", "layers"])
def test_a_wrong_autoencoder_is_refused_before_sampling(offload: str, tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path)
    pipeline = Pipeline.from_pretrained(
        checkpoint, vae=checkpoint / "model.safetensors", offload=offload, device="cpu"
    )
    steps: list[int] = []
    with pytest.raises(KinemaError, match="these weights do not fit VideoVAE"):
        next(pipeline.generate_all([pipeline.request("a")], on_step=steps.append))
    assert steps == []
    right = Pipeline.from_pretrained(checkpoint, offload=offload, device="cpu")
    next(right.generate_all([right.request("a")], on_step=steps.append))
    assert steps


@pytest.mark.parametrize("has_it", [True, False])
def test_the_usual_precision_is_bf16_on_a_gpu_that_has_it(
    has_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return has_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    checkpoint = write_run(tmp_path)
    usual = Pipeline.from_pretrained(checkpoint, device="cuda")
    assert usual.dtype == usual.vae_dtype == ("bf16" if has_it else "fp32")
    assert Pipeline.from_pretrained(checkpoint, device="cuda", dtype="fp32").dtype == "fp32"
    on_cpu = Pipeline.from_pretrained(checkpoint, device="cpu")
    assert on_cpu.dtype == "fp32"
    assert on_cpu.load().model.x_embedder.proj.weight.dtype == torch.float32


def test_what_the_encoder_cuts_off_is_shown() -> None:
    pipeline = tiny_pipeline()  # takes 8 tokens, the begin marker included
    assert pipeline.lost_words("one two three four five six seven") == ""
    assert pipeline.lost_words("one two three four five six seven eight nine") == "eight nine"
