from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kinema.config.errors import KinemaError
from kinema.config.settings import from_dict
from kinema.generation.clip import Clip, free_names, slug
from kinema.generation.config import GenerateRequest
from kinema.media.probe import probe
from tests.unit.generation.tiny import tiny_pipeline


def test_a_clip_is_a_playable_video_with_all_about_it_beside(tmp_path: Path) -> None:
    clip = tiny_pipeline().generate("a red kite", seed=5)
    path = clip.save(tmp_path / "new" / "kite.mp4")
    info = probe(path)
    assert (info.num_frames, info.width, info.height, info.fps) == (17, 32, 32, 8.0)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["request"]["prompt"] == "a red kite"
    assert about["request"]["seed"] == 5
    assert set(about["seconds"]) == {"text", "sample", "decode"}
    assert len(about["config_sha256"]) == 64
    assert about["versions"]["torch"]
    assert from_dict(GenerateRequest, about["request"]) == clip.request
    assert sorted(p.name for p in path.parent.iterdir()) == ["kite.json", "kite.mp4"]


def test_one_frame_is_an_image(tmp_path: Path) -> None:
    clip = tiny_pipeline().generate("a red kite", num_frames=1)
    with pytest.raises(KinemaError, match=r"written as \.png"):
        clip.save(tmp_path / "kite.mp4")
    assert probe(clip.save(tmp_path / "kite.png")).kind == "image"


def test_nothing_is_overwritten_silently(tmp_path: Path) -> None:
    request = GenerateRequest(prompt="a kite", width=32, height=32, num_frames=1)
    clip = Clip(np.zeros((1, 32, 32, 3), np.uint8), request)
    path = clip.save(tmp_path / "kite.png")
    before = path.read_bytes()
    white = Clip(np.full((1, 32, 32, 3), 255, np.uint8), request)
    with pytest.raises(KinemaError, match="not overwritten"):
        white.save(path)
    assert path.read_bytes() == before
    white.save(path, overwrite=True)
    assert path.read_bytes() != before


def test_names_say_prompt_and_seed_and_are_free(tmp_path: Path) -> None:
    request = GenerateRequest(prompt="A red kite!", width=32, height=32, num_frames=17, seed=3)
    (name,) = free_names(tmp_path, [request])
    assert name == tmp_path / "a-red-kite-seed3.mp4"
    name.touch()
    assert [p.name for p in free_names(tmp_path, [request])] == ["a-red-kite-seed3-again2.mp4"]
    second = GenerateRequest(
        prompt="A red kite!", width=32, height=32, num_frames=17, seed=3, sample=1
    )
    assert [p.name for p in free_names(tmp_path, [second])] == ["a-red-kite-seed3-2.mp4"]
    refined = replace(second, prompt="A long description", refined_from="A red kite!")
    assert [p.name for p in free_names(tmp_path, [refined])] == ["a-red-kite-seed3-2.mp4"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A Red  kite, over the sea.", "a-red-kite-over-the-sea"),
        ("../../etc/passwd", "etc-passwd"),
        ("…", "clip"),
        ("ein Drachen über dem Meer", "ein-drachen-über-dem-meer"),
        ("海の上の赤い凧", "海の上の赤い凧"),
    ],
)
def test_slugs(prompt: str, name: str) -> None:
    assert slug(prompt) == name


def test_long_prompts_make_file_names_that_file_systems_take() -> None:
    for prompt in ("word " * 500, "w" * 500, "凧" * 500):
        assert len(slug(prompt)) <= 60
        assert len(slug(prompt).encode()) <= 180
