from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kinema.config.errors import ConfigError
from kinema.config.settings import from_dict
from kinema.data import buckets
from kinema.data.buckets import (
    NOT_DRAWN,
    PROBABILITY_ZERO,
    TOO_SHORT,
    TOO_SMALL,
    BucketTable,
    keyed_draw,
)
from kinema.data.config import DataConfig
from kinema.data.explain import explain
from tests.unit.data.clip_tables import generated, stage

FULL_HD = (1080, 1920)


def place(
    settings: dict[str, Any], clips: list[tuple[int, int, int]], numbers: float = 0.0
) -> list[tuple[str, int] | int]:
    """(resolution, frames) of every (frames, height, width), all draws being `numbers`."""
    table = BucketTable(settings)

    def draw(rows: NDArray[np.int64], ordinal: int, nth: int) -> NDArray[np.float64]:
        return np.full(len(rows), numbers)

    found = table.assign(*np.array(clips).T, draw)
    at = table.buckets
    return [(at[i].resolution, at[i].frames) if i >= 0 else int(i) for i in found]


def test_length_must_be_exceeded() -> None:
    settings = {"144p": {51: (1.0, 4), 102: (1.0, 2)}}
    clips = [(n, *FULL_HD) for n in (50, 51, 52, 102, 103, 1000)]
    want = [TOO_SHORT, TOO_SHORT, 51, 51, 102, 102]
    got = [p if isinstance(p, int) else p[1] for p in place(settings, clips)]
    assert got == want


def test_frame_interval_stretches_the_length() -> None:
    table = BucketTable({"144p": {10: (1.0, 4)}}, frame_interval=3)
    found = table.assign(
        np.array([30, 31]), np.array([144, 144]), np.array([256, 256]), keyed_draw(0, 0)
    )
    assert found[0] == TOO_SHORT
    assert found[1] >= 0


def test_area_of_at_least_eight_tenths() -> None:
    settings = {"10x10": {1: (1.0, 4)}}
    clips = [(1, 8, 10), (1, 10, 8), (1, 79, 1), (1, 20, 20)]
    assert place(settings, clips) == [("10x10", 1), ("10x10", 1), TOO_SMALL, ("10x10", 1)]


def test_largest_resolution_first_whatever_the_order_of_the_recipe() -> None:
    settings = {"144p": {1: (1.0, 4)}, "720p": {1: (1.0, 4)}, "256": {1: (1.0, 4)}}
    sizes = [(1, 1080, 1920), (1, 360, 640), (1, 144, 256)]
    assert [p[0] for p in place(settings, sizes) if not isinstance(p, int)] == [
        "720p", "256", "144p",
    ]  # fmt: skip


def test_images_and_videos_keep_apart() -> None:
    assert place({"144p": {1: (1.0, 4)}}, [(1, *FULL_HD), (2, *FULL_HD)]) == [
        ("144p", 1), TOO_SHORT,
    ]  # fmt: skip
    assert place({"144p": {4: (1.0, 4)}}, [(1, *FULL_HD), (5, *FULL_HD)]) == [
        TOO_SHORT, ("144p", 4),
    ]  # fmt: skip


def test_pair_falls_to_a_shorter_length_then_to_a_lower_resolution() -> None:
    settings = {
        "360p": {51: (0.2, 4), 102: ((0.4, 0.7), 2)},
        "144p": {51: (1.0, 8), 102: (1.0, 6)},
    }
    clip = [(200, *FULL_HD)]
    assert place(settings, clip, 0.3) == [("360p", 102)]
    assert place(settings, clip, 0.5) == [("144p", 102)]  # tried, not kept
    assert place(settings, clip, 0.7) == [("144p", 102)]  # a draw equal to it still tries
    assert place(settings, clip, 0.8) == [("144p", 102)]  # not tried: 51 frames, not kept
    settings["360p"][51] = (0.9, 4)
    assert place(settings, clip, 0.8) == [("360p", 51)]


def test_probability_zero_without_batch_size_sends_to_a_lower_resolution() -> None:
    settings = {"360p": {51: (1.0, 4), 102: (0.0, None)}, "144p": {51: (1.0, 8)}}
    clips = [(200, *FULL_HD), (60, *FULL_HD)]
    assert place(settings, clips) == [("144p", 51), ("360p", 51)]


def test_reasons() -> None:
    settings = {"360p": {51: (0.5, 4), 102: (0.0, None)}}
    clips = [(60, 144, 256), (20, *FULL_HD), (200, *FULL_HD), (60, *FULL_HD)]
    assert place(settings, clips, 0.9) == [TOO_SMALL, TOO_SHORT, PROBABILITY_ZERO, NOT_DRAWN]


def test_draws_depend_on_row_epoch_and_seed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = generated(3000)
    sizes = [clips.column(n) for n in ("num_frames", "height", "width")]
    table, _ = stage(1)
    whole = table.assign(*sizes, keyed_draw(7, 2))
    rows = np.arange(1000, 1500)
    part = table.assign(*(s[rows] for s in sizes), keyed_draw(7, 2), rows)
    assert np.array_equal(part, whole[rows])
    monkeypatch.setattr(buckets, "_CHUNK", 77)
    assert np.array_equal(table.assign(*sizes, keyed_draw(7, 2)), whole)
    assert (table.assign(*sizes, keyed_draw(7, 3)) != whole).mean() > 0.3
    assert (table.assign(*sizes, keyed_draw(8, 2)) != whole).mean() > 0.3


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("clip", [(1, 720, 1280), (300, 1080, 1920), (700, 700, 700), (60, 90, 90)])
def test_explained_chances_are_the_frequencies(number: int, clip: tuple[int, int, int]) -> None:
    table, _ = stage(number)
    told = explain(table, *clip)
    draws = 40_000
    sizes = (np.full(draws, n) for n in clip)
    found = table.assign(*sizes, keyed_draw(3, 1))
    assert sum(chance for _, chance in told.chances) + told.left_out == pytest.approx(1)
    assert (found < 0).mean() == pytest.approx(told.left_out, abs=0.01)
    for bucket, chance in told.chances:
        assert (found == bucket.index).mean() == pytest.approx(chance, abs=0.01), str(bucket)


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ((60, 90, 90), "too small for every resolution"),
        ((2, 1080, 1920), "takes its length"),
        ((1, 1080, 1920), "takes its length"),
        ((60, 1080, 1920), "probability 0"),
    ],
)
def test_explains_why_nowhere(clip: tuple[int, int, int], reason: str) -> None:
    told = explain(BucketTable({"144p": {51: (0.0, None)}}), *clip)
    assert told.left_out == 1
    assert reason in told.lines[-1]


def test_published_recipes_have_the_published_buckets() -> None:
    table, _ = stage(3)
    assert table.settings["480p 204 frames"] == [[0.5, 0.5], 1]
    assert table.settings["480p 408 frames"] == [0.0, None]
    assert len(table.levels) == 10


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ({"144q": {"1": [1.0, 4]}}, "144p"),
        ({"144p": {"1": [1.5, 4]}}, "not in 0..1"),
        ({"144p": {"1": [[0.5, 0.5], 4]}}, "images have one probability"),
        ({"144p": {"51": [0.5, None]}}, "needs a batch size"),
        ({"144p": {"51": [0.5, 0]}}, "less than 1"),
        ({"144p": {"0": [0.5, 1]}}, "at least 1 frame"),
        ({"144p": {}}, "no number of frames"),
        ({}, "at least one bucket"),
        ({"144p": {"many": [1.0, 4]}}, "integer"),
    ],
)
def test_settings_that_cannot_be_meant(bucket: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(DataConfig, {"buckets": bucket})
