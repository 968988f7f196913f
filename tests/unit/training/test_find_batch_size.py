"""`kinema train --find-batch-size` on a CPU, against a limit; and sizes as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.cli.find_batch_size import size_of
from kinema.config.errors import ConfigError
from kinema.config.recipe import load_recipe
from kinema.training.config import TrainRecipe
from kinema.training.find_batch_size import find_batch_sizes
from kinema.training.memory import predict
from tests.integration.train_fixtures import smoke, write_clips


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), count=12)


def test_it_finds_the_most_that_fits_and_trains_nothing(manifest: Path, tmp_path: Path) -> None:
    recipe = smoke(manifest, tmp_path / "outputs")
    memory = predict(recipe, world_size=1, local_size=1, device="cpu")
    bucket = None
    for fraction in (1.0, 0.9):
        if bucket is None:
            first = find_batch_sizes(recipe, device="cpu", limit=2**40)
            (only,) = first.found
            bucket = only.length.bucket
            assert only.most == 12, "no more than there are clips"
            assert only.seconds is not None
            assert only.seconds > 0
        limit = memory.needed(bucket, 7)
        found = find_batch_sizes(recipe, device="cpu", limit=limit, fraction=fraction)
        (only,) = found.found
        expected = max(n for n in range(1, 8) if memory.needed(bucket, n) <= fraction * limit)
        assert only.most == expected
        assert (expected == 7) == (fraction == 1.0)
        assert only.needed <= found.available
        assert found.largest.data.buckets["16x16"][5] == (1.0, expected)
        assert found.equal.data.buckets["16x16"][5] == (1.0, expected)
        # A bucket without clips stays as it was.
        assert found.largest.data.buckets["16x16"][1] == recipe.data.buckets["16x16"][1]
    assert not (tmp_path / "outputs").exists()


def test_what_ranks_share_leaves_room(manifest: Path, tmp_path: Path) -> None:
    wide = ["model.hidden_size=256", "model.depth=3", "parallel={shard: zero2}"]
    recipe = smoke(manifest, tmp_path / "outputs", *wide)
    alone = predict(recipe, world_size=1, local_size=1, device="cpu")
    (found,) = find_batch_sizes(recipe, device="cpu", limit=alone.fixed.total).found
    assert found.most == 0
    assert found.seconds is None
    (found,) = find_batch_sizes(recipe, device="cpu", limit=alone.fixed.total, ranks=4).found
    assert found.most > 0
    assert found.needed < alone.fixed.total


def test_a_cpu_needs_a_limit_and_data_a_name(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory-limit"):
        find_batch_sizes(smoke(manifest, tmp_path), device="cpu")
    with pytest.raises(ConfigError, match="data-path"):
        find_batch_sizes(load_recipe("tiny/smoke", TrainRecipe), device="cpu", limit=10**9)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("512MiB", 512 * 2**20), ("1.5g", 15 * 10**8), ("1000", 1000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples", "2XB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        size_of(text)
