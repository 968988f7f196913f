"""Every way to generate, end to end with tiny random networks: what the mask says is kept is the
encoded reference; the rest follows reference, prompt and seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from kinema.cli.main import app
from kinema.generation import engine
from kinema.generation.pipeline import Pipeline
from kinema.media.image import read_image
from kinema.media.read import read_frames
from kinema.media.transform import image_resize_crop, resize_crop
from tests.unit.generation.tiny import tiny_pipeline, write_run
from tests.unit.media.clips import pictures, write_clip

FAMILIES = ("stdit3", "stdit2", "stdit")
FRAMES = {"stdit3": 51, "stdit2": 6, "stdit": 6}
"""Frames of a clip: 15 latent frames, or as many as frames."""

Piece = tuple[int, str, int, int] | tuple[int, str, int, int, int]
"""First latent frame of the clip, file, first frame and end in the file: what must lie there; of
its latent frames as many as the last number says."""


@dataclass(frozen=True)
class Way:
    options: dict[str, Any]
    chunks: list[Piece]
    """With 1.2's autoencoder: 17 frames make 5 latent ones, and 5 are taken from a video."""
    frames: list[Piece]
    """With an image autoencoder: each frame for itself, and 2 are taken from a video."""


# `v` and `w` have 40 frames. From T on counts the clip's end: -1 is its last latent frame.
WAYS = {
    "image": Way({"image": "a.png"}, [(0, "a.png", 0, 1)], [(0, "a.png", 0, 1)]),
    "edit": Way(
        {"edit": "v.mp4", "edit_strength": 0.0},
        [(0, "v.mp4", 0, 17), (5, "v.mp4", 17, 34)],
        [(0, "v.mp4", 0, 6)],
    ),
    "extend": Way({"extend": "v.mp4"}, [(0, "v.mp4", 23, 40)], [(0, "v.mp4", 38, 40)]),
    "extend_back": Way({"extend_back": "v.mp4"}, [(-5, "v.mp4", 0, 17)], [(-2, "v.mp4", 0, 2)]),
    "connect images": Way(
        {"connect": ("a.png", "b.png")},
        # 1.2 puts an image where a chunk begins, the last one for the end.
        [(0, "a.png", 0, 1), (-5, "b.png", 0, 1)],
        [(0, "a.png", 0, 1), (-1, "b.png", 0, 1)],
    ),
    "connect videos": Way(
        {"connect": ("v.mp4", "w.mp4")},
        [(0, "v.mp4", 23, 40), (-5, "w.mp4", 0, 17)],
        [(0, "v.mp4", 38, 40), (-2, "w.mp4", 0, 2)],
    ),
    "loop of an image": Way(
        {"make_loop": "a.png"},
        [(0, "a.png", 0, 1), (-5, "a.png", 0, 1)],
        [(0, "a.png", 0, 1), (-1, "a.png", 0, 1)],
    ),
    "loop of a video": Way(
        {"make_loop": "v.mp4"},
        [(0, "v.mp4", 17, 34), (-5, "v.mp4", 0, 17)],
        [(0, "v.mp4", 38, 40), (-2, "v.mp4", 0, 2)],
    ),
    "references": Way(
        {"references": "b.png;w.mp4", "mask_strategy": "0;0,1,5,5,1"},
        [(0, "b.png", 0, 1), (5, "w.mp4", 17, 34, 1)],
        [(0, "b.png", 0, 1), (5, "w.mp4", 5, 6)],
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    moving = pictures(45)
    Image.fromarray(moving[0]).save(folder / "a.png")
    Image.fromarray(moving[20][:, ::-1]).save(folder / "b.png")
    Image.fromarray(255 - moving[9]).save(folder / "other.png")
    write_clip(folder / "v.mp4", moving[:40])
    write_clip(folder / "w.mp4", moving[5:, ::-1].copy())
    write_clip(folder / "other.mp4", 255 - moving[:40])
    return folder


@cache
def pipeline_of(family: str) -> Pipeline:
    return tiny_pipeline(family)


@pytest.fixture
def here(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    return files


def latents(family: str, prompt: str = "a kite", **options: Any) -> Tensor:
    """`[C, T, H, W]`."""
    pipeline = pipeline_of(family)
    options = {"num_frames": FRAMES[family], "seed": 3} | options
    return pipeline.latents([pipeline.request(prompt, **options)])[0]


@torch.no_grad()
def encoded(family: str, name: str, start: int, stop: int) -> Tensor:
    """Frames of a file through the autoencoder, without anything of `kinema.generation`."""
    if name.endswith(".png"):
        pixels = image_resize_crop(read_image(name), (32, 32))
    else:
        pixels = resize_crop(read_frames(name, range(start, stop)), (32, 32))
    vae = pipeline_of(family).load().vae
    return vae.encode(torch.from_numpy(pixels)[None])[0]


def pieces(family: str, way: Way) -> list[tuple[int, Tensor]]:
    """First latent frame and what must lie from there on."""
    total = 15 if family == "stdit3" else FRAMES[family]
    found = way.chunks if family == "stdit3" else way.frames
    made = []
    for first, name, start, stop, *rest in found:
        limit = rest[0] if rest else None
        kept = encoded(family, name, start, stop)
        if limit is not None:
            kept = kept[:, :limit]
        made.append((first % total, kept[:, : total - first % total]))
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", WAYS)
def test_what_is_kept_is_the_encoded_reference(name: str, family: str, here: Path) -> None:
    way = WAYS[name]
    got = latents(family, **way.options)
    free = torch.ones(got.shape[1], dtype=torch.bool)
    for first, kept in pieces(family, way):
        there = slice(first, first + kept.shape[1])
        torch.testing.assert_close(got[:, there], kept, rtol=0, atol=1e-5)
        free[there] = False
    assert free.any() == (name != "edit" or family == "stdit3")
    # The rest is generated: another prompt and another seed change it, and only it.
    for change in ({"prompt": "two boats at night"}, {"seed": 4}):
        other = latents(family, **way.options | change)
        assert torch.equal(other[:, ~free], got[:, ~free])
        for frame in free.nonzero().flatten():
            assert not torch.allclose(other[:, frame], got[:, frame], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["image", "extend", "connect videos"])
def test_another_reference_changes_the_rest(way: str, family: str, here: Path) -> None:
    options = WAYS[way].options

    def other(value: Any) -> Any:
        if isinstance(value, tuple):
            return (value[0], "other.mp4")
        return "other" + Path(value).suffix

    one = latents(family, **options)
    two = latents(family, **{name: other(value) for name, value in options.items()})
    middle = one.shape[1] // 2
    assert not torch.allclose(one[:, middle], two[:, middle], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_edit_strength_goes_from_the_video_to_a_new_one(family: str, here: Path) -> None:
    kept = latents(family, edit="v.mp4", edit_strength=0.0)
    free = latents(family)
    changed = [latents(family, edit="v.mp4", edit_strength=s) for s in (0.4, 0.9)]
    for one in changed:
        assert not torch.allclose(one[:, 0], kept[:, 0], atol=1e-4)
        assert not torch.allclose(one[:, 0], free[:, 0], atol=1e-4)
    assert not torch.allclose(changed[0], changed[1], atol=1e-4)
    # At 1 nothing is left of the video.
    new = latents(family, edit="v.mp4", edit_strength=1.0)
    torch.testing.assert_close(new, latents(family, edit="other.mp4", edit_strength=1.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_references_do_not_depend_on_the_batch(family: str, here: Path) -> None:
    pipeline = pipeline_of(family)
    frames = FRAMES[family]
    requests = [
        pipeline.request("a kite", num_frames=frames, image="a.png"),
        pipeline.request("a boat", num_frames=frames, seed=5),
        pipeline.request("a fish", num_frames=frames, edit="v.mp4", edit_strength=0.5),
    ]
    together = pipeline.latents(requests)
    for row, request in enumerate(requests):
        alone = pipeline.latents([request])[0]
        scale = max(1.0, float(alone.abs().max()))
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5 * scale)


SEGMENTS = {"stdit3": (34, 17), "stdit2": (6, 2), "stdit": (6, 2)}
"""Frames of a segment, and those it shares with the one before."""


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_go_on_from_one_another(family: str, here: Path) -> None:
    pipeline, (frames, shared) = pipeline_of(family), SEGMENTS[family]

    def video(prompt: str, loop: int = 3, **options: Any) -> np.ndarray:
        return pipeline.generate(prompt, num_frames=frames, loop=loop, seed=3, **options).frames

    whole = video("|0| a kite |2| a boat")
    assert len(whole) == 3 * (frames - shared) + shared
    assert np.array_equal(whole[:frames], video("a kite", loop=1))
    second_end = 2 * (frames - shared) + shared
    assert np.array_equal(whole[:second_end], video("a kite", loop=2))
    # The third segment has a text of its own; the first two do not know of it.
    other = video("|0| a kite |2| two ships")
    assert np.array_equal(whole[:second_end], other[:second_end])
    assert not np.array_equal(whole[second_end:], other[second_end:])
    # What a segment may change of the one before, and how much it takes over, matters.
    loose = video("a kite", loop=2, condition_frame_edit=0.9)
    assert not np.array_equal(loose, whole[:second_end])


def test_a_longer_start_makes_a_shorter_video(here: Path) -> None:
    pipeline = pipeline_of("stdit2")
    lengths = [
        len(pipeline.generate("a", num_frames=6, loop=2, condition_frame_length=n).frames)
        for n in (1, 3)
    ]
    assert lengths == [11, 9]


def test_a_segment_starts_from_the_decoded_end_of_the_last(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As 1.2 does: the frames encoded again, not the latents they came from."""
    pipeline = pipeline_of("stdit3")
    made: list[Tensor] = []
    sample = engine.sample

    def remember(*args: Any, **options: Any) -> Tensor:
        made.append(sample(*args, **options))
        return made[-1]

    monkeypatch.setattr(engine, "sample", remember)
    pipeline.generate("a kite", num_frames=34, loop=2, seed=3)
    vae = pipeline.load().vae
    with torch.no_grad():
        again = vae.encode(vae.decode(made[0], 34))
    torch.testing.assert_close(made[1][:, :, :5], again[:, :, 5:], rtol=0, atol=1e-5)
    assert not torch.allclose(made[1][:, :, :5], made[0][:, :, 5:], atol=1e-4)


def test_ways_over_several_segments_end_in_the_last(here: Path) -> None:
    pipeline = pipeline_of("stdit2")
    clip = pipeline.generate("a", num_frames=6, loop=2, connect=("a.png", "b.png"), seed=3)
    vae = pipeline.load().vae
    assert len(clip.frames) == 10

    def decoded(name: str) -> np.ndarray:
        with torch.no_grad():
            video = vae.decode(encoded("stdit2", name, 0, 1)[None], 1)[0]
        return engine.to_bytes(video)[0]

    assert np.abs(clip.frames[0].astype(int) - decoded("a.png")).max() <= 1
    assert np.abs(clip.frames[-1].astype(int) - decoded("b.png")).max() <= 1


@pytest.mark.parametrize("family", ["stdit3", "stdit2", "stdit", "pixart"])
def test_text_to_image(family: str) -> None:
    pipeline = pipeline_of(family)
    clips = [pipeline.generate(p, num_frames=1) for p in ("a kite", "a boat")]
    assert clips[0].frames.shape == (1, 32, 32, 3)
    assert clips[0].suffix == ".png"
    assert not np.array_equal(clips[0].frames, clips[1].frames)


@pytest.mark.parametrize(("family", "frames"), [("dit", 1), ("latte", 6)])
def test_class_to_image_and_video(family: str, frames: int) -> None:
    pipeline = pipeline_of(family)
    clips = [pipeline.generate(number) for number in ("0", "9")]
    assert [len(c.frames) for c in clips] == [frames, frames]
    assert not np.array_equal(clips[0].frames, clips[1].frames)


def test_an_image_can_be_edited(here: Path) -> None:
    kept = latents("stdit3", edit="a.png", edit_strength=0.0, num_frames=1)
    torch.testing.assert_close(kept, encoded("stdit3", "a.png", 0, 1), rtol=0, atol=1e-5)


def test_the_command_line_makes_what_python_makes(here: Path, tmp_path: Path) -> None:
    """Through files: a checkpoint, references, segments with texts of their own, a sidecar."""
    checkpoint = write_run(tmp_path, "stdit2")
    out = tmp_path / "out"
    arguments = ["--ckpt-path", checkpoint.parent, "--save-dir", out, "--num-frames", 6]
    arguments += ["--prompt", "|0| a kite |1| a boat", "--connect", "v.mp4,b.png", "--loop", 2]
    arguments += ["--aes", 6.5, "--seed", 3, "--condition-frame-length", 1]
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    (video,) = out.glob("*.mp4")
    assert video.name in result.output
    about = json.loads(video.with_suffix(".json").read_text())
    assert about["texts"] == [f"{t} aesthetic score: 6.5." for t in ("a kite", "a boat")]
    assert any("b.png is 48x32; it is resized" in note for note in about["notes"])
    sidecar = about["request"]
    assert sidecar["references"] == ["v.mp4", "b.png"]
    assert sidecar["mask_strategy"] == "0,0,-1,0,1,0;1,1,0,-1,1,0"
    assert (sidecar["loop"], sidecar["aes"]) == (2, 6.5)
    same = Pipeline.from_pretrained(checkpoint).generate(
        "|0| a kite |1| a boat",
        num_frames=6,
        loop=2,
        aes=6.5,
        seed=3,
        references="v.mp4;b.png",
        mask_strategy="0,0,-1;1,1,0,-1",
        condition_frame_length=1,
    )
    assert same.save(tmp_path / "same.mp4").read_bytes() == video.read_bytes()
    assert len(same.frames) == 11
