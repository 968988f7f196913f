"""Mask strategies: what they mean, and that what points outside is refused with numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kinema.generation.mask_strategy import (
    MaskStrategyError,
    Placement,
    check,
    condition,
    continue_from,
    notation,
    overlap_frames,
    parse,
)
from kinema.models.config import ImageVAEConfig, VideoVAEConfig

SHAPE = (4, 10, 2, 3)


def reference(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(4, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_notation_is_read_and_written() -> None:
    text = "0,0,-5,0,5,0.25;2,1,0,-1,1,0"
    assert parse(text) == (Placement(0, 0, -5, 0, 5, 0.25), Placement(2, 1, 0, -1, 1, 0.0))
    assert notation(parse(text)) == text
    assert parse("") == ()
    exact = Placement(0, 0, 1234567, 0, 1, 1 / 3)
    assert parse(notation([exact])) == (exact,)


@pytest.mark.parametrize("text", ["a", "0,,1", ";", "0;", "1.5", "0,0,0,0,1,x"])
def test_what_is_no_strategy_is_refused(text: str) -> None:
    with pytest.raises(MaskStrategyError, match="not numbers joined by commas") as caught:
        parse(text)
    assert repr(text) in str(caught.value)


def test_too_many_values_are_refused() -> None:
    with pytest.raises(MaskStrategyError, match="7 values; there are six"):
        parse("0,0,0,0,1,0,0")


def test_references_lie_where_the_strategy_says() -> None:
    a, b = reference(5, 1), reference(10, 2)
    given = condition(parse("0,0,1,0,2;0,1,-3,-3,3,0.4;1,1"), [a, b], 0, SHAPE)
    assert given is not None
    assert given.mask.tolist() == pytest.approx([0, 0, 1, 1, 1, 1, 1, 0.4, 0.4, 0.4])
    assert torch.equal(given.latents[:, :2], a[:, 1:3])
    assert torch.equal(given.latents[:, 7:], b[:, 7:])
    assert not given.latents[:, 2:7].any()


def test_a_later_entry_wins() -> None:
    a, b = reference(10, 1), reference(10, 2)
    given = condition(parse("0,0,0,0,4;0,1,0,2,1,0.5"), [a, b], 0, SHAPE)
    assert given is not None
    assert given.mask[:4].tolist() == [0, 0, 0.5, 0]
    assert torch.equal(given.latents[:, 2], b[:, 0])
    assert torch.equal(given.latents[:, 3], a[:, 3])


def test_other_segments_are_left_alone() -> None:
    assert condition(parse("1,0"), [reference(5)], 0, SHAPE) is None
    assert condition((), [], 0, SHAPE) is None


def test_starts_are_aligned() -> None:
    ref = reference(10)
    given = condition(parse("0,0,4,-1,3"), [ref], 0, SHAPE, align=5)
    assert given is not None
    # 4 is nearest to 5; the last frame belongs to the stretch that begins at 5.
    assert given.mask.tolist() == [1] * 5 + [0, 0, 0] + [1, 1]
    assert torch.equal(given.latents[:, 5:8], ref[:, 5:8])


def test_a_segment_goes_on_from_the_last() -> None:
    previous = reference(10, 3)
    placements, references = continue_from((), (), previous, 2, 4, 0.1)
    assert notation(placements) == "2,0,-4,0,4,0.1"
    given = condition(placements, references, 2, SHAPE)
    assert given is not None
    assert given.mask.tolist() == pytest.approx([0.1] * 4 + [1] * 6)
    assert torch.equal(given.latents[:, :4], previous[:, 6:])


OUTSIDE = [
    ("1,0", "segment 1 is not there: 1 segment", "segment 0"),
    ("-1,0", "segment -1 is not there", "segment 0"),
    ("0,2", "reference 2 is not there: 2 references", "reference from 0 to 1"),
    ("0,0,5", "reference start 5 is not there: the reference has 5", "from -5 to 4"),
    ("0,0,-6", "reference start -6", "from -5 to 4"),
    ("0,0,0,10", "target start 10 is not there: a segment has 10", "from -10 to 9"),
    ("0,0,0,-11", "target start -11", "from -10 to 9"),
    ("0,1,0,8,3", "length 3 is not there: .* from target start 8 on there are 2", "from 1 to 2"),
    ("0,0,-2,0,3", "length 3 is not there: from reference start -2 on there are 2", "from 1 to 2"),
    ("0,0,0,-1,2", "length 2 is not there", "length 1"),
    ("0,0,0,0,0", "length 0 is not there", "from 1 to 5"),
    ("0,0,0,0,1,1.5", "edit ratio is 1.5", "from 0 to 1"),
    ("0,0,0,0,1,nan", "edit ratio is nan", "from 0 to 1"),
]


@pytest.mark.parametrize(("text", "message", "allowed"), OUTSIDE, ids=[t for t, _, _ in OUTSIDE])
def test_what_points_outside_is_refused_with_numbers(text: str, message: str, allowed: str) -> None:
    with pytest.raises(MaskStrategyError, match=message) as caught:
        check(parse(text), reference_lengths=[5, 10], latent_frames=10)
    assert allowed in str(caught.value.hint)


def test_what_lies_inside_is_fine() -> None:
    placements = parse("0,0,-5,-5,5;1,1,9,0,1,1;2,1,0,0,10,0.5")
    assert check(placements, reference_lengths=[5, 10], latent_frames=10, loop=3) == ()


def test_a_strategy_without_a_reference_is_refused() -> None:
    with pytest.raises(MaskStrategyError, match="needs a reference"):
        check(parse("0"), reference_lengths=[], latent_frames=10)


def test_moved_starts_are_told() -> None:
    (note,) = check(parse("0,0,0,-1,1"), reference_lengths=[5], latent_frames=15, align=5)
    assert "steps of 5" in note
    assert "goes to frame 10" in note
    assert not check(parse("0,0,-5,-5,5"), reference_lengths=[10], latent_frames=15, align=5)


VIDEO, IMAGES = VideoVAEConfig(), ImageVAEConfig()


def test_frames_that_two_segments_share() -> None:
    assert overlap_frames(5, 51, VIDEO) == 17
    assert overlap_frames(10, 51, VIDEO) == 34
    assert overlap_frames(4, 16, IMAGES) == 4


def test_shared_frames_of_a_single_chunk_are_those_its_latents_stand_for() -> None:
    # 9 frames are padded to 12: the first of three latent frames stands for one frame.
    assert [overlap_frames(n, 9, VIDEO) for n in (1, 2)] == [1, 5]
    whole = VideoVAEConfig(micro_frame_size=None)
    assert [overlap_frames(n, 16, whole) for n in (1, 2, 3)] == [4, 8, 12]


@pytest.mark.parametrize(
    ("length", "num_frames", "vae", "hint"),
    [(7, 51, VIDEO, "5 or 10"), (3, 51, VIDEO, "5"), (7, 34, VIDEO, "5"),
     (15, 51, VIDEO, "at most 10, or segments of 68 frames"),
     (16, 16, IMAGES, "at most 15, or segments of 17 frames"),
     (1, 1, VIDEO, "segments of 5 frames"), (5, 17, VIDEO, "segments of 34 frames"),
     (4, 17, VIDEO, "5, with segments of 34 frames")],
)  # fmt: skip
def test_shared_frames_that_cannot_be(
    length: int, num_frames: int, vae: VideoVAEConfig | ImageVAEConfig, hint: str
) -> None:
    with pytest.raises(MaskStrategyError) as caught:
        overlap_frames(length, num_frames, vae)
    assert caught.value.hint is not None
    assert caught.value.hint.removesuffix(" (--num-frames) or more") == hint
