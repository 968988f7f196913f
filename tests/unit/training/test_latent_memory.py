from __future__ import annotations

import torch

from kinema.config.recipe import load_recipe
from kinema.models.build import build_vae
from kinema.training.config import TrainRecipe
from kinema.training.cost import bucket_cost
from kinema.training.encode import LatentMemory


def test_each_video_is_encoded_once_whatever_its_company() -> None:
    torch.manual_seed(0)
    vae = build_vae(load_recipe("tiny/smoke", TrainRecipe).vae).eval()
    calls: list[int] = []
    usual = vae.encode

    def counted(video: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(len(video))
        return usual(video, **options)  # type: ignore[arg-type]

    vae.encode = counted  # type: ignore[method-assign]
    videos = torch.rand(3, 3, 5, 16, 16) * 2 - 1
    memory = LatentMemory(vae)
    first = memory.encode(videos)
    again = memory.encode(videos[[2, 0]])
    assert calls == [1, 1, 1]
    assert torch.equal(again, first[[2, 0]])
    # An empty memory, as after a resume, gives the same bits.
    assert torch.equal(LatentMemory(vae).encode(videos[1:2]), first[1:2])
    calls.clear()
    memory.encode(videos + 1e-3)
    assert len(calls) == 3, "another crop of the same clip is another video"


def test_remembered_latents_cost_nothing() -> None:
    class Bucket:
        frames, height, width = 17, 64, 64

    plain, remembered = (
        load_recipe("tiny/world", TrainRecipe, [f"task.remember_latents={flag}"])
        for flag in ("false", "true")
    )
    saved = bucket_cost(plain)(Bucket()) - bucket_cost(remembered)(Bucket())
    assert saved == plain.vae.encode_flops(17, 64, 64)
