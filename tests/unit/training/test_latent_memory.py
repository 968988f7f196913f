from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
import torch

from kinema.config.recipe import load_recipe
from kinema.data.buckets import Bucket
from kinema.data.loader import Batch, ClipKey
from kinema.models.autoencoder import Autoencoder
from kinema.models.build import build_vae
from kinema.parallel.sequence import SequenceGroups
from kinema.parallel.world import World
from kinema.telemetry.spans import Spans
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost
from kinema.training.encode import LatentMemory, TextSource
from kinema.training.parts import in_working_precision
from kinema.training.tasks import TextToVideo

BUCKET = Bucket(0, "16x16", 5, 1.0, 16, 16, 4)
VIDEOS = torch.rand(3, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
KEYS = [ClipKey(row, 0, 5, 16, 16) for row in range(3)]


def batch(keys: Sequence[ClipKey], memory: LatentMemory | None = None) -> Batch:
    """Of these clips, as a loader gives it that asked `memory`."""
    decoded = [memory is None or key not in memory for key in keys]
    rows = [key.row for key in keys]
    return Batch(
        video=VIDEOS[[row for row, pixels in zip(rows, decoded, strict=True) if pixels]],
        text=[""] * len(keys),
        fps=torch.ones(len(keys)),
        rows=np.array(rows),
        keys=tuple(keys),
        decoded=tuple(decoded),
        bucket=BUCKET,
        weight=1.0,
        degree=1,
        skipped=[],
    )


@pytest.fixture
def vae() -> Autoencoder:
    torch.manual_seed(0)
    return build_vae(load_recipe("tiny/smoke", TrainRecipe).vae).eval()


def test_each_clip_is_encoded_once_whatever_its_company(vae: Autoencoder) -> None:
    calls: list[int] = []
    usual = vae.encode

    def counted(video: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(len(video))
        return usual(video, **options)  # type: ignore[arg-type]

    vae.encode = counted  # type: ignore[method-assign]
    memory = LatentMemory()
    assert KEYS[0] not in memory
    first = memory.latents(vae, batch(KEYS, memory))
    assert calls == [1, 1, 1]
    assert KEYS[0] in memory
    assert KEYS[0]._replace(start=1) not in memory, "another crop is another video"
    mixed = batch([KEYS[2], KEYS[0]], memory)
    assert len(mixed.video) == 0
    assert torch.equal(memory.latents(vae, mixed), first[[2, 0]])
    # Decoded ahead, before the memory knew it.
    assert torch.equal(memory.latents(vae, batch([KEYS[1]])), first[1:2])
    assert len(calls) == 3
    # An empty memory, as after a resume, gives the same bits.
    assert torch.equal(LatentMemory().latents(vae, batch([KEYS[1]])), first[1:2])


def test_known_and_new_clips_share_a_batch(vae: Autoencoder) -> None:
    memory, whole = LatentMemory(), LatentMemory()
    memory.latents(vae, batch([KEYS[1]]))
    mixed = batch([KEYS[2], KEYS[1], KEYS[0]], memory)
    assert mixed.decoded == (True, False, True)
    want = whole.latents(vae, batch([KEYS[2], KEYS[1], KEYS[0]]))
    assert torch.equal(memory.latents(vae, mixed), want)


def test_remembered_latents_cost_nothing() -> None:
    plain, remembered = (
        load_recipe("tiny/world", TrainRecipe, [f"task.remember_latents={flag}"])
        for flag in ("false", "true")
    )
    saved = bucket_cost(plain)(BUCKET) - bucket_cost(remembered)(BUCKET)
    assert saved == plain.vae.encode_flops(5, 16, 16)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_frozen_autoencoder_runs_in_half_precision_where_it_can(
    vae: Autoencoder, precision: str
) -> None:
    device = torch.device("cpu")
    in_working_precision(vae, precision, device)
    assert {p.dtype for p in vae.parameters()} == {torch.float32}  # a GPU is where it pays
    in_working_precision(vae, precision, device, on="cpu")
    half = precision == "bf16"
    assert {p.dtype for p in vae.parameters()} == {torch.bfloat16 if half else torch.float32}
    inside: list[bool] = []
    module = next(m for m in vae.modules() if isinstance(m, torch.nn.GroupNorm))
    module.register_forward_pre_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    recipe = load_recipe("tiny/smoke", TrainRecipe)
    task = TextToVideo(
        recipe, vae, cast(TextSource, None), None, Spans(), SequenceGroups(World(0, 1, device))
    )
    generator = torch.Generator().manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = task._latents(batch(KEYS), generator)
    assert set(inside) == {not half}
    assert latents.dtype == torch.float32
    want = build_vae(recipe.vae).eval()
    want.load_state_dict(vae.state_dict())
    exact = want.encode(VIDEOS, noise=generator.manual_seed(0))
    assert (latents - exact).norm() < 0.05 * exact.norm()
