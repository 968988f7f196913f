"""References: what of a file is used, how it is brought to size, and what is refused or told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.diffusion.config import RectifiedFlowConfig
from kinema.generation.config import GenerateRequest, PipelineConfig, TextComponent, VAEComponent
from kinema.generation.mask_strategy import MaskStrategyError, condition
from kinema.generation.references import plan_references, reference_length, segment_overlap
from kinema.media.errors import MediaError
from kinema.media.read import read_frames
from kinema.media.transform import image_resize_crop, resize_crop
from kinema.models.config import HashTextConfig, ImageVAEConfig, STDiT3Config, VideoVAEConfig
from tests.unit.media.clips import pictures, write_clip


def config(vae: VideoVAEConfig | ImageVAEConfig | None = None, **values: Any) -> PipelineConfig:
    return PipelineConfig(
        model=STDiT3Config(caption_channels=16, model_max_length=8),
        vae=VAEComponent(config=vae or VideoVAEConfig()),
        text=TextComponent(config=HashTextConfig(dim=16, max_tokens=8)),
        diffusion=RectifiedFlowConfig(),
        fps=25.0,
        **values,
    )


def request(*references: Path, mask_strategy: str = "0", **values: Any) -> GenerateRequest:
    shape = {"width": 48, "height": 32, "num_frames": 34, "fps": 25.0}
    return GenerateRequest(
        prompt="a",
        references=tuple(map(str, references)),
        mask_strategy=mask_strategy,
        **(shape | values),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames of 48x32 at 25 per second."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", pictures(40))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "image.png"
    Image.fromarray(pictures(1, 40, 30)[0]).save(path)
    return path


def means(pixels: Tensor) -> Tensor:
    """Stands for an autoencoder: every chunk of 17 frames (or less) becomes ceil(n / 4) frames
    that hold its mean colour and first frame."""
    frames = -(-pixels.shape[1] // 4)
    assert pixels.shape[1] <= 17
    latent = pixels[:, :, ::8, ::8]
    first = latent[:1, :1].expand(-1, frames, -1, -1)
    return torch.cat([latent.mean(dim=1, keepdim=True).expand(-1, frames, -1, -1), first])


def pixels_of(video: Path, start: int, stop: int) -> Tensor:
    frames = read_frames(video, range(start, stop))
    return torch.from_numpy(resize_crop(frames, (32, 48)))


def test_a_video_is_cut_to_whole_chunks_from_its_start(video: Path) -> None:
    plan = plan_references(request(video, mask_strategy="0,0,0,0,5"), config())
    (used,) = plan.references
    assert (used.first, used.num_frames, used.latent_frames) == (0, 34, 10)
    assert "40 frames; the autoencoder takes 34, the last 6 are not used" in "".join(plan.notes)


def test_or_from_its_end_where_only_the_end_is_used(video: Path) -> None:
    plan = plan_references(request(video, mask_strategy="0,0,-5,0,5"), config())
    (used,) = plan.references
    assert (used.first, used.num_frames, used.latent_frames) == (6, 34, 10)
    assert "the first 6 are not used" in "".join(plan.notes)
    (latents,) = plan.encode(means, VideoVAEConfig(), height=32, width=48)
    assert torch.equal(latents[:, 5:], means(pixels_of(video, 23, 40)))


def test_only_what_is_used_is_read_and_encoded(video: Path) -> None:
    plan = plan_references(request(video, mask_strategy="0,0,6,0,1"), config())
    seen = []

    def encode(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return means(pixels)

    (latents,) = plan.encode(encode, VideoVAEConfig(), height=32, width=48)
    assert [p.shape for p in seen] == [(3, 17, 32, 48)]
    assert torch.equal(seen[0], pixels_of(video, 17, 34))
    assert latents.shape == (4, 10, 4, 6)
    assert not latents[:, :5].any()
    given = condition(plan.placements, [latents], 0, (4, 10, 4, 6))
    assert given is not None
    assert torch.equal(given.latents[:, 0], means(pixels_of(video, 17, 34))[:, 1])


def test_an_image_autoencoder_takes_every_frame(video: Path) -> None:
    settings = config(ImageVAEConfig())
    plan = plan_references(request(video, mask_strategy="0,0,15,0,20"), settings)
    assert (plan.references[0].latent_frames, plan.notes) == (40, ())

    def encode(pixels: Tensor) -> Tensor:
        return torch.cat([pixels[:, :, ::8, ::8], pixels[:1, :, ::8, ::8]])

    (latents,) = plan.encode(encode, ImageVAEConfig(), height=32, width=48)
    assert torch.equal(latents[:, 15:35], encode(pixels_of(video, 15, 35)))


def test_an_image_is_one_latent_frame_resized_and_cropped(image: Path) -> None:
    plan = plan_references(request(image), config())
    assert plan.references[0].latent_frames == 1
    assert plan.notes == (
        "image.png is 30x40; it is resized to cover 48x32 and cropped to its middle",
    )
    seen = []
    plan.encode(lambda p: (seen.append(p), means(p))[1], VideoVAEConfig(), height=32, width=48)
    assert np.array_equal(seen[0], image_resize_crop(pictures(1, 40, 30)[0], (32, 48)))


def test_the_same_shape_in_another_size_is_not_worth_a_note(tmp_path: Path) -> None:
    Image.fromarray(pictures(1, 64, 96)[0]).save(tmp_path / "a.png")
    assert plan_references(request(tmp_path / "a.png"), config()).notes == ()


@pytest.mark.parametrize(("fps", "word"), [(12.5, "2 times as slow"), (50.0, "2 times as fast")])
def test_another_frame_rate_is_told(video: Path, fps: float, word: str) -> None:
    moving = request(video, mask_strategy="0,0,0,0,5", fps=fps)
    assert word in "".join(plan_references(moving, config()).notes)


def test_single_frames_have_neither_rate_nor_length(video: Path) -> None:
    still = request(video, mask_strategy="0;0,0,-1,-1,1", fps=50.0)
    assert plan_references(still, config()).notes == ()


def test_the_frame_rate_of_the_file_counts(video: Path) -> None:
    moving = request(video, mask_strategy="0,0,0,0,5", fps=75.0)
    notes = plan_references(moving, config(frame_interval=3)).notes
    assert not any("per second" in note for note in notes)


def test_files_that_are_none_are_refused(tmp_path: Path, video: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        plan_references(request(tmp_path / "none.png"), config())
    (tmp_path / "broken.mp4").write_bytes(video.read_bytes()[:300])
    with pytest.raises(MediaError):
        plan_references(request(tmp_path / "broken.mp4"), config())
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(MediaError, match="no known video or image"):
        plan_references(request(tmp_path / "text.png"), config())
    with pytest.raises(KinemaError, match="files on this machine"):
        plan_references(
            GenerateRequest(
                prompt="a", width=48, height=32, num_frames=34, mask_strategy="0",
                references=("https://example.org/a.png",),
            ),
            config(),
        )  # fmt: skip


def test_a_clip_of_references_alone_is_told(video: Path, image: Path) -> None:
    def notes(strategy: str, **values: Any) -> str:
        return " ".join(
            plan_references(request(video, mask_strategy=strategy, **values), config()).notes
        )

    assert "nothing is generated" in notes("0,0,0,0,10")
    assert "nothing is generated" in notes("0,0,0,0,5;0,0,-5,-5,5")
    for strategy in ("0,0,0,0,9", "0,0,0,0,10,0.1", "0,0,0,0,10;0,0,0,3,1,1"):
        assert "nothing is generated" not in notes(strategy)
    assert "nothing is generated" not in notes("0,0,0,0,10", loop=2, condition_frame_length=5)
    assert "nothing is generated" in " ".join(
        plan_references(request(image, num_frames=1), config()).notes
    )


def test_a_reference_that_nothing_uses_is_refused(video: Path, image: Path) -> None:
    with pytest.raises(MaskStrategyError, match="reference 1 is given, but") as caught:
        plan_references(request(video, image), config())
    assert "--mask-strategy 0,1" in str(caught.value.hint)


def test_a_strategy_beyond_the_video_is_refused(video: Path) -> None:
    with pytest.raises(MaskStrategyError, match="the reference has 10 latent frames"):
        plan_references(request(video, mask_strategy="0,0,10"), config())


def test_latent_frames_of_a_file(video: Path, image: Path) -> None:
    assert reference_length(video, VideoVAEConfig()) == 10
    assert reference_length(video, ImageVAEConfig()) == 40
    assert reference_length(image, VideoVAEConfig()) == 1


def test_a_clip_of_one_chunk_takes_references_anywhere(video: Path) -> None:
    aligned = config(align=5)
    short = plan_references(request(video, mask_strategy="0,0,-2,-2,2", num_frames=17), aligned)
    assert short.align is None
    assert "steps of" not in " ".join(short.notes)
    longer = plan_references(request(video, mask_strategy="0,0,-2,-2,2", num_frames=34), aligned)
    assert longer.align == 5
    assert "steps of 5" in " ".join(longer.notes)


def test_segments_share_what_the_model_can_take_over() -> None:
    aligned = config(align=5, condition_frame_length=5)

    def asked(**values: Any) -> GenerateRequest:
        return request(mask_strategy="", **values)

    assert segment_overlap(asked(), aligned) == (0, 0)
    assert segment_overlap(asked(loop=2), aligned) == (5, 17)
    longer = asked(loop=2, num_frames=51, condition_frame_length=10)
    assert segment_overlap(longer, aligned) == (10, 34)
    with pytest.raises(MaskStrategyError, match="in steps of 5 latent frames, not 4") as caught:
        segment_overlap(asked(loop=2, condition_frame_length=4), aligned)
    assert caught.value.hint == "5"


def test_a_chunk_is_taken_over_by_default() -> None:
    assert config().frames_taken_over == 5
    assert config(ImageVAEConfig()).frames_taken_over == 4
    assert config(condition_frame_length=10).frames_taken_over == 10
    assert segment_overlap(request(mask_strategy="", loop=2), config()) == (5, 17)
