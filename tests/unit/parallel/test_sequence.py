"""Ranks that share clips compute what one rank computes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.models.build import build_transformer
from kinema.models.config import DiTConfig, LatteConfig, PixArtConfig
from kinema.models.frames import ALL_AT_HAND
from kinema.models.image_vae import ImageVAE
from kinema.models.vae import VideoVAE
from kinema.parallel.encode import deal
from kinema.parallel.sequence import SequenceGroups, share_frames
from kinema.parallel.world import World
from tests.unit.models import test_image_vae, test_vae
from tests.unit.parallel.sequence_driver import CASES, SIZE, cases_of

ROOT = Path(__file__).resolve().parents[3]
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What `sequence_driver` found, by number of ranks and case."""
    results = {}
    for ranks in (2, 4):
        path = tmp_path_factory.mktemp("sequence") / f"{ranks}.json"
        done = subprocess.run(
            [sys.executable, "-m", "tests.unit.parallel.sequence_driver", str(ranks), str(path)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stderr
        results[ranks] = json.loads(path.read_text())
    return results


def test_outputs_and_gradients_of_ranks_that_share_are_those_of_one(
    found: dict[int, dict[str, Any]],
) -> None:
    """Every rank asserted that, case by case; also of recomputation, encoding, rows."""
    assert list(found[4]) == cases_of(4)
    assert list(found[2]) == cases_of(2)
    assert len(cases_of(4)) == len(CASES) - 1


def sent(ranks: int, element: int) -> int:
    """The formula of docs/parallel.md: bytes that a rank sends in one all-to-all."""
    batch, frames, places = 3, 5, 6
    t, s = math.ceil(frames / ranks), math.ceil(places / ranks)
    return (ranks - 1) * batch * t * s * SIZE["hidden_size"] * element


def test_volume_is_that_of_the_formula(found: dict[int, dict[str, Any]]) -> None:
    blocks = SIZE["depth"]  # that attend along time
    assert found[2]["bytes"] == [sent(2, 4)] * (4 * blocks)
    assert found[4]["bytes"] == [sent(4, 4)] * (4 * blocks)
    assert found[4]["bytes in bfloat16"] == [sent(4, 2)] * (4 * blocks)
    assert found[4]["bytes with full"] == [sent(4, 2)] * (6 * blocks)
    assert found[4]["bytes with selective"] == [sent(4, 2)] * (4 * blocks)


def test_encoding_is_dealt_out(found: dict[int, dict[str, Any]]) -> None:
    """Frames that each rank encoded: of 3 clips of 5 + 5 + 2 frames, of one, of images."""
    assert found[4]["video clips"] == [10, 7, 7, 12]
    assert found[4]["one video clip"] == [0, 5, 5, 2]
    assert found[4]["images"] == [9, 9, 9, 9]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("clips", [1, 2, 5])
@pytest.mark.parametrize("frames", [1, 4, 17])
def test_every_chunk_is_encoded_once(ranks: int, clips: int, frames: int) -> None:
    vae: VideoVAE | ImageVAE
    for vae in (
        test_vae.build(test_vae.tiny(micro_frame_size=4)),
        test_image_vae.build(test_image_vae.tiny()),
    ):
        seen = torch.zeros(clips, frames)
        latents = torch.zeros(clips, vae.config.latent_size(frames, 16, 16)[0])
        shares = deal(vae, clips, frames, ranks)
        for share in shares:
            for part in share:
                seen[part.clips, part.frames] += 1
                latents[part.clips, part.latent_frames] += 1
        assert bool((seen == 1).all())
        assert bool((latents == 1).all())
        assert len(shares) == ranks
        assert max(map(len, shares)) <= 3  # calls of the encoder: whole clips go together


@pytest.mark.parametrize(("size", "most"), [(1, 2), (6, 4), (3, 2)])
def test_ranks_that_do_not_divide_are_refused(size: int, most: int) -> None:
    with pytest.raises(KinemaError, match=rf"{most} ranks .* divide the run's {size}") as error:
        SequenceGroups(World(0, size, torch.device("cpu")), most)
    assert error.value.where == "parallel.sequence"
    assert f"at most {size & -size} here" in str(error.value)


def test_other_models_are_refused() -> None:
    groups = SequenceGroups(ALONE)
    with torch.device("meta"):
        for config in (DiTConfig(), LatteConfig(), PixArtConfig()):
            model = build_transformer(config)
            with pytest.raises(KinemaError, match="cannot share a clip") as error:
                share_frames(model, groups)
            assert error.value.where == "parallel.sequence"


def test_a_rank_alone_shares_nothing() -> None:
    groups = SequenceGroups(ALONE)
    assert groups.gather("x") == ["x"]
    assert torch.equal(groups.stack(torch.ones(2)), torch.ones(1, 2))
    assert groups.frames_of(7) is ALL_AT_HAND
