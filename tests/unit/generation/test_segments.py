"""Frames that are given, and segments that go on from one another, in every model that can."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kinema.generation import engine
from kinema.generation.mask_strategy import parse
from kinema.generation.pipeline import Pipeline
from kinema.generation.references import plan_references
from kinema.media.probe import probe
from kinema.media.write import write_image, write_video
from tests.unit.generation.tiny import WITH_FRAMES, tiny_config, tiny_parts, tiny_pipeline

CPU = torch.device("cpu")
with_frames = pytest.mark.parametrize("family", WITH_FRAMES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two images and two videos of 34 frames, 32x32."""
    folder = tmp_path_factory.mktemp("references")
    rows, columns = np.mgrid[:32, :32]
    found = {}
    for name, phase in (("one", 0.0), ("two", 2.0)):
        frames = [
            127 + 120 * np.sin(phase + t / 5 + np.stack([rows, columns, rows + columns], -1) / 6)
            for t in range(34)
        ]
        video = np.stack(frames).astype(np.uint8)
        found[f"{name} image"] = folder / f"{name}.png"
        found[f"{name} video"] = folder / f"{name}.mp4"
        write_image(found[f"{name} image"], video[0])
        write_video(found[f"{name} video"], video, 8.0)
    return found


def length(family: str) -> dict[str, int]:
    """More than one chunk of the video autoencoder."""
    return {"num_frames": 34 if family == "stdit3" else 6}


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def encoded(pipeline: Pipeline, request_references: tuple[str, ...], strategy: str) -> list[Tensor]:
    """The references' latents, by the plan that the request makes."""
    frames = length(pipeline.config.model.type)["num_frames"]
    request = pipeline.request(
        "a", references=request_references, mask_strategy=strategy, num_frames=frames
    )
    vae = pipeline.load().vae
    return list(
        plan_references(request, pipeline.config).encode(
            lambda pixels: engine.encode(vae, pixels, CPU),
            pipeline.config.vae.config,
            height=32,
            width=32,
        )
    )


@with_frames
def test_given_frames_are_kept_and_shape_the_rest(family: str, files: dict[str, Path]) -> None:
    pipeline = tiny_pipeline(family)

    def latents(reference: str | None, prompt: str = "a kite") -> Tensor:
        given = {} if reference is None else {"image": files[f"{reference} image"]}
        request = pipeline.request(prompt, seed=1, **length(family), **given)
        return pipeline.latents([request])[0]

    one, other, free = latents("one"), latents("two"), latents(None)
    want = encoded(pipeline, (str(files["one image"]),), "0")[0]
    assert float((one[:, 0] - want[:, 0]).abs().max()) <= 1e-5
    assert not close(one[:, 0], other[:, 0])
    assert not close(one[:, 1:], other[:, 1:])  # another reference changes the rest
    assert not close(one[:, 1:], free[:, 1:])
    assert not close(one[:, 1:], latents("one", "a boat")[:, 1:])


@with_frames
def test_videos_are_placed_by_the_mask_strategy(family: str, files: dict[str, Path]) -> None:
    pipeline = tiny_pipeline(family)
    step = 5 if family == "stdit3" else 2
    references = (str(files["one video"]), str(files["two video"]))
    strategy = f"0,0,-{step},0,{step};0,1,0,-{step},{step}"  # connect
    request = pipeline.request(
        "a", references=references, mask_strategy=strategy, seed=2, **length(family)
    )
    found = pipeline.latents([request])[0]
    first, second = encoded(pipeline, references, strategy)
    assert float((found[:, :step] - first[:, -step:]).abs().max()) <= 1e-5
    assert float((found[:, -step:] - second[:, :step]).abs().max()) <= 1e-5
    # As a way it wants room for something new.
    same = pipeline.request("a", connect=references, num_frames=51 if step == 5 else 6)
    assert parse(same.mask_strategy) == parse(strategy)


@with_frames
def test_an_edit_starts_from_the_video_at_its_strength(family: str, files: dict[str, Path]) -> None:
    pipeline = tiny_pipeline(family)

    def latents(strength: float) -> Tensor:
        request = pipeline.request(
            "a", edit=files["one video"], edit_strength=strength, seed=1,
            num_sampling_steps=4, **length(family),
        )  # fmt: skip
        return pipeline.latents([request])[0]

    video = encoded(pipeline, (str(files["one video"]),), f"0,0,0,0,{latents(0).shape[1]}")[0]
    assert float((latents(0.0) - video[:, : latents(0).shape[1]]).abs().max()) <= 1e-5
    assert not close(latents(0.5), latents(0.0))
    assert not close(latents(0.5), latents(1.0))


@with_frames
def test_requests_with_and_without_frames_share_a_batch(
    family: str, files: dict[str, Path]
) -> None:
    pipeline = tiny_pipeline(family)
    requests = [
        pipeline.request("a", seed=1, image=files["one image"], **length(family)),
        pipeline.request("b", seed=2, **length(family)),
        pipeline.request("c", seed=3, image=files["two image"], **length(family)),
    ]
    together = pipeline.latents(requests)
    for row, request in zip(together, requests, strict=True):
        assert close(row, pipeline.latents([request])[0])
    clips = list(pipeline.generate_all(requests, batch_size=3))
    assert [clip.record["batch_size"] for clip in clips] == [3, 3, 3]
    assert "encode" in clips[0].record["seconds"]
    assert "encode" not in clips[1].record["seconds"]


@with_frames
def test_segments_go_on_from_one_another(family: str) -> None:
    pipeline = tiny_pipeline(family)
    taken, shown = (5, 17) if family == "stdit3" else (2, 2)
    frames = length(family)["num_frames"]
    request = pipeline.request("a kite", seed=1, loop=3, **length(family))
    clip = next(pipeline.generate_all([request]))
    assert len(clip.frames) == 3 * (frames - shown) + shown
    alone = next(pipeline.generate_all([replace(request, loop=1)]))
    assert np.array_equal(clip.frames[:frames], alone.frames)

    # The second segment begins with the first one's last frames, encoded again.
    sampled: list[Tensor] = []
    parts = pipeline.load()
    original = engine.decode

    def watch(vae: object, z: Tensor, count: int, device: torch.device) -> Tensor:
        sampled.append(z)
        return original(vae, z, count, device)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "decode", watch)
        next(pipeline.generate_all([request]))
    for before, after in itertools.pairwise(sampled):
        video = original(parts.vae, before, frames, CPU)
        again = engine.encode(parts.vae, video, CPU)
        assert float((after[:, :taken] - again[:, -taken:]).abs().max()) <= 1e-5
        assert not close(after[:, taken:], before[:, taken:])


@with_frames
def test_each_segment_has_its_text_and_its_noise(family: str) -> None:
    pipeline = tiny_pipeline(family)
    shown = 17 if family == "stdit3" else 2
    frames = length(family)["num_frames"]

    def clip(prompt: str) -> np.ndarray:
        request = pipeline.request(prompt, seed=1, loop=2, **length(family))
        return next(pipeline.generate_all([request])).frames

    same, changes = clip("|0| a kite"), clip("|0| a kite |1| a boat at night")
    assert np.array_equal(same[:frames], changes[:frames])
    assert not np.array_equal(same[frames:], changes[frames:])
    assert not np.array_equal(same[shown:frames], same[frames:][: frames - shown])


def test_segments_of_different_numbers_go_in_one_call() -> None:
    pipeline = tiny_pipeline("stdit2")
    requests = [
        pipeline.request(p, seed=i, loop=n)
        for i, (p, n) in enumerate(zip("abc", (1, 3, 2), strict=True))
    ]
    together = list(pipeline.generate_all(requests, batch_size=4))
    assert [clip.number for clip in together] == [0, 1, 2]
    for clip, request in zip(together, requests, strict=True):
        assert np.array_equal(clip.frames, next(pipeline.generate_all([request])).frames)


def test_text_is_projected_once_for_all_steps() -> None:
    config = tiny_config("stdit2")
    parts = tiny_parts(config)
    calls: list[str] = []
    for name, module in parts.model.named_modules():
        if name.endswith("kv_linear") or name == "y_embedder.y_proj":
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    pipeline = Pipeline(config, parts, device="cpu")
    pipeline.latents([pipeline.request("a", num_sampling_steps=7)])
    assert sorted(calls) == sorted(set(calls))
    assert len(calls) == 3  # two blocks and the projection


def test_the_file_plays_at_the_frame_rate_of_the_training_clips(tmp_path: Path) -> None:
    config = replace(tiny_config("stdit2"), frame_interval=3)
    pipeline = Pipeline(config, tiny_parts(config), device="cpu")
    clip = pipeline.generate("a", fps=24.0)
    assert (clip.request.fps, clip.fps) == (24.0, 8.0)
    assert probe(clip.save(tmp_path / "a.mp4")).fps == 8.0


def test_a_prompt_may_carry_its_references(files: dict[str, Path]) -> None:
    pipeline = tiny_pipeline("stdit2")
    image = files["one image"]
    carried = pipeline.request(
        f'a kite {{"reference_path": "{image}", "mask_strategy": "0,0,0,2"}}'
    )
    given = pipeline.request("a kite", references=[image], mask_strategy="0,0,0,2")
    assert carried == given
    first = parse("0")
    assert parse(pipeline.request("a kite", image=image).mask_strategy) == first
    assert parse(pipeline.request("a kite", references=str(image)).mask_strategy) == first


def test_a_checkpoints_own_score_is_appended_unless_refused() -> None:
    config = replace(tiny_config("stdit2"), aes=6.5)
    pipeline = Pipeline(config, tiny_parts(config), device="cpu")
    assert pipeline.request("a").aes == 6.5
    assert pipeline.request("a", aes=5.0).aes == 5.0
    plain = pipeline.request("a", aes="none")
    assert plain.aes is None
    scored, unscored = pipeline.latents([pipeline.request("a"), plain])
    assert not close(scored, unscored)
