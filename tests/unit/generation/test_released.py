"""The table of released checkpoints."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinema.config.errors import KinemaError
from kinema.config.settings import from_dict, to_dict
from kinema.generation.check import check_request
from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.options import make_request
from kinema.generation.released import (
    GENERATIONS,
    RELEASED,
    SIZES,
    ReleasedFiles,
    find_released,
    locate,
    wanted,
)
from kinema.models.config import mismatch


def test_names_are_unique_and_found() -> None:
    names = [r.name for r in RELEASED]
    assert len(set(names)) == len(names)
    assert all(find_released(n) is r for n, r in zip(names, RELEASED, strict=True))
    assert {r.generation for r in RELEASED} == set(GENERATIONS) - {"2.0"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opensora-1-2", "did you mean opensora-1.2"),
        ("PixArt-Sigma-2K", "did you mean pixart-sigma-2k"),
        ("opensora-2.0", r"not in this version(.|\n)*opensora-1\.2 is the newest"),
        ("hunyuan", "`kinema models` lists all"),
    ],
)
def test_other_names(name: str, message: str) -> None:
    with pytest.raises(KinemaError, match=message):
        find_released(name)


@pytest.mark.parametrize("released", RELEASED, ids=lambda r: r.name)
def test_every_entry_can_generate_as_it_stands(released: Any) -> None:
    config = released.config
    assert mismatch(config.model, config.text.config) is None
    assert config.vae.config.latent_channels == config.model.in_channels
    assert from_dict(PipelineConfig, to_dict(config)) == config
    prompt = "7" if released.text is None else "a red kite"
    for bucket in config.buckets:
        request = GenerateRequest(
            prompt=prompt, width=bucket.width, height=bucket.height, num_frames=bucket.num_frames
        )
        check_request(request, config)
    # A setting that nothing was trained in begins with what it is for.
    count = sum(len(row.frames) for row in released.trained or released.extrapolates)
    assert len(config.buckets) == count
    untrained = {(r.resolution, n) for r in released.extrapolates for n in r.frames}
    assert not untrained & {(r.resolution, n) for r in released.trained for n in r.frames}
    assert {(r.resolution, n) for r in released.several_gpus for n in r.frames} <= untrained | {
        (r.resolution, n) for r in released.trained for n in r.frames
    }
    assert {r.resolution for r in (*released.trained, *released.extrapolates)} <= set(SIZES)


def test_published_sampling_defaults() -> None:
    """From the published recipes of inference."""
    defaults = {
        r.name: (r.config.diffusion.num_sampling_steps, r.config.diffusion.cfg_scale, r.config.fps)
        for r in RELEASED
    }
    assert defaults["opensora-1.0"] == (100, 7.0, 8.0)
    assert defaults["opensora-1.1"] == (100, 7.0, 24.0)
    assert defaults["opensora-1.2"] == (30, 7.0, 24.0)
    assert defaults["dit-xl2-256"] == (20, 4.0, 1.0)
    assert defaults["pixart-alpha-512"][:2] == (20, 7.0)
    assert defaults["opensora-1.0-64"] == (100, 7.0, 12.0)
    one, two = find_released("opensora-1.1").config, find_released("opensora-1.2").config
    assert (one.frame_interval, one.condition_frame_length) == (3, 4)
    assert (one.align, one.aes) == (None, None)
    assert (two.frame_interval, two.condition_frame_length) == (1, 5)
    assert (two.align, two.aes) == (5, 6.5)


def test_the_64_frames_of_1_0() -> None:
    """The published recipe of inference: 64x512x512 at 12 frames per second, time_scale 2/3."""
    long, short = find_released("opensora-1.0-64"), find_released("opensora-1.0")
    assert (long.model, long.vae, long.text) == (short.model, short.vae, short.text)
    assert long.config.model == replace(
        short.config.model, input_size=(64, 64, 64), time_scale=2 / 3
    )
    request = make_request("a red kite", long.config, {})
    shape = (request.num_frames, request.height, request.width, request.fps)
    assert shape == (64, 512, 512, 12.0)
    assert long.config.played_fps(request.fps) == 12.0
    assert not long.trained


def test_it_is_read_without_torch() -> None:
    code = """
import sys
import kinema.generation.released as r
r.wanted(r.find_released("opensora-1.2"))
assert not [m for m in ("torch", "transformers", "huggingface_hub") if m in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_locate_takes_what_is_given(tmp_path: Path) -> None:
    model, vae, text = tmp_path / "m.pth", tmp_path / "v.safetensors", tmp_path / "t5"
    model.touch()
    vae.touch()
    text.mkdir()
    released = find_released("opensora-1.2")
    found = locate(released, ckpt=model, vae=str(vae), text=text, offline=True)
    assert found == ReleasedFiles(model, vae, text)
    classes = locate(find_released("dit-xl2-256"), ckpt=model, vae=vae, offline=True)
    assert classes.text is None
    with pytest.raises(KinemaError, match=r"the text encoder: DeepFloyd/t5-v1_1-xxl"):
        locate(released, ckpt=model, vae=vae, offline=True)


def test_flags_are_those_of_generate() -> None:
    roles = wanted(find_released("opensora-1.2"))
    assert {role: w.flag for role, w in roles.items()} == {
        "model": "--ckpt-path", "vae": "--vae", "text": "--text",
    }  # fmt: skip


def test_a_whole_pipeline_of_diffusers_is_a_place(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    for name in ("dit-xl2-256", "pixart-sigma-512"):
        found = locate(
            find_released(name), ckpt=tmp_path, vae=tmp_path, text=tmp_path, offline=True
        )
        assert (found.model, found.vae) == (tmp_path / "transformer", tmp_path / "vae")
