"""The cache of text embeddings: same values out as in, refused when anything differs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest
from kinema.data.text_cache import StaleCacheError, TextCache, caption_hashes, manifest_hashes
from kinema.data.text_cache_writer import TextCacheWriter

ENCODER = {"type": "hash-words", "dim": 6, "max_tokens": 5, "inner": {"seed": 1}}
ROWS, TOKENS, DIM = 11, 5, 6


def manifest(root: Path, rows: int = ROWS, **changed: Any) -> Manifest:
    n = np.full(rows, 64)
    text = [f"caption {i}" for i in range(rows)]
    columns = {"path": [f"{i}.mp4" for i in range(rows)], "text": text, "num_frames": n}
    return Manifest.from_columns(
        {**columns, "height": n, "width": n, "fps": n, **changed}, root
    )  # fmt: skip


def embeddings(rows: int = ROWS) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, TOKENS + 1, rows)
    lengths[:2] = 0, TOKENS
    mask = np.arange(TOKENS) < lengths[:, None]
    y = rng.standard_normal((rows, TOKENS, DIM)).astype(np.float16).astype(np.float32)
    return y, mask


def writer(path: Path, table: Manifest, **options: Any) -> TextCacheWriter:
    return TextCacheWriter(path, manifest_hashes(table), ENCODER, **{"dim": DIM} | options)


def write(path: Path, table: Manifest, *, batch: int = 3, **options: Any) -> None:
    y, mask = embeddings(len(table))
    with writer(path, table, **options) as cache:
        for start in range(cache.rows, len(table), batch):
            cache.append(y[start : start + batch], mask[start : start + batch])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shard_bytes", [1, 150, 1 << 20])
def test_any_rows_come_back_as_they_went_in(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    table = manifest(tmp_path)
    write(tmp_path / "cache", table, dtype=dtype, shard_bytes=shard_bytes)
    cache = TextCache.open(tmp_path / "cache", table, dict(ENCODER))
    assert len(cache) == ROWS
    y, mask = embeddings()
    for rows in ([0], [1], [7, 2, 2, 10], list(range(ROWS))):
        got, keep = cache.features(rows)
        length = max(1, int(mask[rows].sum(1).max()))
        assert got.dtype == np.dtype(dtype)
        assert got.shape == (len(rows), length, DIM)
        assert np.array_equal(keep, mask[rows][:, :length])
        assert np.array_equal(got, np.where(keep[..., None], y[rows][:, :length], 0))


def test_shards_are_files_of_bounded_size(tmp_path: Path) -> None:
    write(tmp_path / "cache", manifest(tmp_path), batch=1, shard_bytes=1)
    assert len(list((tmp_path / "cache").glob("tokens-*.safetensors"))) > 5


def test_a_cache_works_in_another_process(tmp_path: Path) -> None:
    table = manifest(tmp_path)
    write(tmp_path / "cache", table)
    cache = TextCache.open(tmp_path / "cache", table, ENCODER)
    first = cache.features([1, 4])
    again = pickle.loads(pickle.dumps(cache)).features([1, 4])
    assert np.array_equal(first[0], again[0])


def test_tokens_may_stand_anywhere_under_the_mask(tmp_path: Path) -> None:
    table = manifest(tmp_path, 1)
    y = np.arange(TOKENS * DIM, dtype=np.float32).reshape(1, TOKENS, DIM)
    mask = np.array([[False, True, False, True, True]])
    with writer(tmp_path / "cache", table) as cache:
        cache.append(y, mask)
    got, keep = TextCache.open(tmp_path / "cache", table, ENCODER).features([0])
    assert keep.all()
    assert np.array_equal(got, y[:, [1, 3, 4]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 300}, "max_tokens is 5 in the cache, now 300"),
        ({"type": "t5", "dim": 7}, 'differs: type is "hash-words" in the cache, now "t5"\n'),
        ({"inner": {"seed": 2}}, "inner.seed is 1 in the cache, now 2"),
        ({"weights": "abc"}, 'weights is null in the cache, now "abc"'),
    ],
)
def test_another_encoder_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    table = manifest(tmp_path)
    write(tmp_path / "cache", table)
    with pytest.raises(StaleCacheError, match=message):
        TextCache.open(tmp_path / "cache", table, ENCODER | change)


def test_other_captions_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "cache", manifest(tmp_path))
    texts = [f"caption {i}" for i in range(ROWS)]
    texts[3], texts[8] = texts[8], texts[3]
    with pytest.raises(StaleCacheError, match="2 captions of manifest differ: rows 3, 8"):
        TextCache.open(tmp_path / "cache", manifest(tmp_path, text=texts), ENCODER)
    with pytest.raises(StaleCacheError, match="has 11 rows, manifest has 12"):
        TextCache.open(tmp_path / "cache", manifest(tmp_path, 12), ENCODER)


def test_what_captions_do_not_depend_on_may_change(tmp_path: Path) -> None:
    write(tmp_path / "cache", manifest(tmp_path))
    other = manifest(tmp_path, height=np.full(ROWS, 32), path=["x.mp4"] * ROWS)
    assert len(TextCache.open(tmp_path / "cache", other, ENCODER)) == ROWS


def test_an_unfinished_cache_leaves_the_old_one_alone(tmp_path: Path) -> None:
    table = manifest(tmp_path)
    write(tmp_path / "cache", table)
    y, mask = embeddings()
    with (
        pytest.raises(KinemaError, match="2 rows were encoded of 11"),
        writer(tmp_path / "cache", table, dtype="float32") as cache,
    ):
        cache.append(y[:2], mask[:2])
    assert TextCache.open(tmp_path / "cache", table, ENCODER).dtype == np.float16


def stop_after(path: Path, table: Manifest, rows: int, **options: Any) -> None:
    """Write in shards of one row each, and stop."""
    y, mask = embeddings(len(table))
    with writer(path, table, shard_bytes=1, **options) as cache:
        for row in range(cache.rows, len(table)):
            if row == rows:
                raise KeyboardInterrupt
            cache.append(y[row : row + 1], mask[row : row + 1])


def test_a_stopped_cache_goes_on(tmp_path: Path) -> None:
    table, path = manifest(tmp_path), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        stop_after(path, table, 7)
    assert not path.exists()
    partial = tmp_path / ".cache.partial"
    (partial / "tokens-00007.safetensors").write_bytes(b"torn")
    (partial / ".tokens-00008.tmp").write_bytes(b"left")
    first = (partial / "tokens-00000.safetensors").stat()
    with writer(path, table) as cache:
        kept = cache.rows
        # A row without tokens takes no place, so it stays open with the next one.
        assert 5 <= kept <= 7
        cache.append(*(part[kept:] for part in embeddings()))
    again = (path / "tokens-00000.safetensors").stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    write(tmp_path / "whole", table)
    rows = list(range(ROWS))
    whole = TextCache.open(tmp_path / "whole", table, ENCODER).features(rows)
    resumed = TextCache.open(path, table, ENCODER).features(rows)
    assert all(np.array_equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert {p.name for p in tmp_path.iterdir()} == {"cache", "whole"}
    names = {"cache.json", "index.safetensors", *(f"tokens-{n:05d}.safetensors" for n in range(8))}
    assert {p.name for p in path.iterdir()} <= names


@pytest.mark.parametrize(
    "change", [{"dtype": "float32"}, {"weights": "other"}, {"captions": caption_hashes("x" * ROWS)}]
)
def test_what_was_begun_of_something_else_is_not_gone_on_with(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stop_after(tmp_path / "cache", manifest(tmp_path), 7)
    options = {"captions": manifest_hashes(manifest(tmp_path))} | change
    with TextCacheWriter(tmp_path / "cache", encoder=ENCODER, dim=DIM, **options) as cache:
        assert cache.rows == 0
        assert [p.name for p in (tmp_path / ".cache.partial").iterdir()] == ["partial.json"]
        cache.append(*embeddings())


def test_two_writers_of_one_cache_do_not_mix(tmp_path: Path) -> None:
    table = manifest(tmp_path)
    with (
        pytest.raises(KinemaError, match="another process is writing"),
        writer(tmp_path / "cache", table),
        writer(tmp_path / "cache", table),
    ):
        pass


def test_captions_are_found_whatever_their_row(tmp_path: Path) -> None:
    captions = ["a cat", "a dog", "a cat", ""]
    y, mask = embeddings(4)
    hashes = caption_hashes(captions)
    with TextCacheWriter(tmp_path / "cache", hashes, ENCODER, dim=DIM) as cache:
        cache.append(y, mask)
    opened = TextCache.open(tmp_path / "cache", None, ENCODER)
    assert opened.find(["", "a cat", "a dog"]).tolist() == [3, 0, 1]
    with pytest.raises(KinemaError, match="no embedding of 'a cow' and 1 more captions"):
        opened.find(["a cat", "a cow", "A cat"])


def test_weights_are_compared_where_they_are_known(tmp_path: Path) -> None:
    table = manifest(tmp_path)
    write(tmp_path / "cache", table, weights="abc")
    for weights in (None, "abc"):
        cache = TextCache.open(tmp_path / "cache", table, ENCODER, weights=weights)
        assert cache.weights == "abc"
    with pytest.raises(StaleCacheError, match='weights is "abc" in the cache, now "xyz"'):
        TextCache.open(tmp_path / "cache", table, ENCODER, weights="xyz")


def test_an_old_cache_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "cache", manifest(tmp_path), batch=1, shard_bytes=1)
    write(tmp_path / "cache", manifest(tmp_path, 4))
    assert len(TextCache.open(tmp_path / "cache", manifest(tmp_path, 4), ENCODER)) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_only_a_cache_is_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    write(mine, manifest(tmp_path))
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(KinemaError, match=r"holds 'thesis\.txt'"):
        write(mine, manifest(tmp_path))
    with pytest.raises(KinemaError, match="no folder"):
        write(mine / "thesis.txt", manifest(tmp_path))
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    table = manifest(tmp_path)
    y, mask = embeddings()
    y[5, 0], mask[5, 0] = 1e6, True
    with writer(tmp_path / "rest", table) as cache:
        cache.append(y[:3], mask[:3])
        with pytest.raises(KinemaError, match="row 5 is not finite in float16"):
            cache.append(y[3:], mask[3:])
        y[5] = 0
        cache.append(y[3:], mask[3:])
    with (
        pytest.raises(KinemaError, match="not \\[n, L, 7\\]"),
        writer(tmp_path / "cache", table, dim=7) as cache,
    ):
        cache.append(y, mask)
    with pytest.raises(KinemaError, match="bfloat16"):
        writer(tmp_path / "cache", table, dtype="bfloat16")


def test_damaged_caches_are_refused(tmp_path: Path) -> None:
    table = manifest(tmp_path)
    with pytest.raises(KinemaError, match=r"no cache\.json"):
        TextCache.open(tmp_path / "cache", table, ENCODER)
    write(tmp_path / "cache", table)
    shard = tmp_path / "cache/tokens-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(KinemaError, match=f"has {len(whole) - 1} bytes instead of {len(whole)}"):
        TextCache.open(tmp_path / "cache", table, ENCODER)
    shard.write_bytes(whole)
    (tmp_path / "cache/index.safetensors").write_bytes(b"x")
    with pytest.raises(KinemaError, match="index is not readable"):
        TextCache.open(tmp_path / "cache", table, ENCODER)
    about = json.loads((tmp_path / "cache/cache.json").read_text())
    (tmp_path / "cache/cache.json").write_text(json.dumps(about | {"format": "other"}))
    with pytest.raises(KinemaError, match="is not of the format"):
        TextCache.open(tmp_path / "cache", table, ENCODER)
