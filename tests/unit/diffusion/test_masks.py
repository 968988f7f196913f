from __future__ import annotations

from typing import get_args

import pytest
import torch

from kinema.diffusion.config import FrameMaskConfig, FrameMaskKind
from kinema.diffusion.masks import GeneratorDraws, frame_mask, frame_masks, pick_kind

KINDS: tuple[FrameMaskKind, ...] = get_args(FrameMaskKind)


def draws(seed: int) -> GeneratorDraws:
    return GeneratorDraws(torch.Generator().manual_seed(seed))


def rows(kind: FrameMaskKind, num_frames: int, n: int = 200) -> set[str]:
    return {
        "".join("1" if v else "0" for v in frame_mask(kind, num_frames, draws(seed)).tolist())
        for seed in range(n)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 5, 15, 30])
def test_every_mask_of_every_length_leaves_something_to_predict(
    kind: FrameMaskKind, num_frames: int
) -> None:
    for row in rows(kind, num_frames, n=40):
        assert len(row) == num_frames
        assert "1" in row
        if kind != "identity" and kind != "random" and num_frames > 1:
            assert "0" in row


@pytest.mark.parametrize(
    ("kind", "num_frames", "want"),
    [
        ("identity", 4, {"1111"}),
        ("image_head", 4, {"0111"}),
        ("image_tail", 4, {"1110"}),
        ("image_head_tail", 4, {"0110"}),
        ("image_head_tail", 2, {"01"}),
        ("image_random", 3, {"011", "101", "110"}),
        ("interpolate", 5, {"01010", "10101"}),
        ("quarter_head", 8, {"01111111", "00111111"}),
        ("quarter_tail", 8, {"11111110", "11111100"}),
        ("quarter_head_tail", 8, {"01111110", "00111100"}),
        ("quarter_random", 3, {"011", "101", "110"}),
        ("quarter_head", 2, {"01"}),
    ],
)
def test_what_each_kind_keeps_clean(kind: FrameMaskKind, num_frames: int, want: set[str]) -> None:
    assert rows(kind, num_frames) == want


def test_random_keeps_between_a_tenth_and_nine_tenths_clean() -> None:
    shares = torch.stack(
        [(~frame_mask("random", 1000, draws(seed))).float().mean() for seed in range(200)]
    )
    assert 0.05 < float(shares.min()) < 0.2
    assert 0.8 < float(shares.max()) < 0.95
    assert abs(float(shares.mean()) - 0.5) < 0.05


def test_kinds_come_in_their_ratios() -> None:
    config = FrameMaskConfig(image_head=0.3, image_tail=0.2)
    masks = frame_masks(config, 4000, 5, torch.Generator().manual_seed(0))
    assert masks.shape == (4000, 5)
    assert masks.dtype == torch.bool
    head_clean, tail_clean = ((~masks[:, i]).float().mean() for i in (0, -1))
    assert abs(float(head_clean) - 0.3) < 0.03
    assert abs(float(tail_clean) - 0.2) < 0.03
    assert abs(float(masks.all(dim=1).float().mean()) - 0.5) < 0.03


def test_no_ratios_mask_nothing_and_all_of_one_kind_masks_all() -> None:
    generator = torch.Generator().manual_seed(0)
    assert frame_masks(FrameMaskConfig(), 50, 5, generator).all()
    assert not frame_masks(FrameMaskConfig(image_head=1.0), 50, 5, generator)[:, 0].any()


def test_draws_come_from_the_generator_alone() -> None:
    config = FrameMaskConfig(random=0.5, quarter_random=0.5)
    torch.manual_seed(1)
    first = frame_masks(config, 32, 15, torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    assert torch.equal(first, frame_masks(config, 32, 15, torch.Generator().manual_seed(3)))


def test_rounding_at_the_end_of_the_ratios_is_the_rest() -> None:
    assert pick_kind({"random": 0.1, "interpolate": 0.2}, 0.05) == "random"
    assert pick_kind({"random": 0.1, "interpolate": 0.2}, 0.1) == "interpolate"
    assert pick_kind({"random": 0.1, "interpolate": 0.2}, 0.999999) == "identity"
