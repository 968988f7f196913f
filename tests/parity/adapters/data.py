"""Aspect tables, the bucket rule and the sampler of the originals, on our code.

Our rule takes its random draws as an argument; here they come from the originals' generators. The
order of batches is ours, so the sampler's cases are compared in what they mean: how many samples
and how many batches each bucket has.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kinema.config.errors import ConfigError
from kinema.data import draws
from kinema.data.aspect import NAMED, aspect_names, size_for
from kinema.data.balance import lay_out
from kinema.data.buckets import BucketTable, Draw
from kinema.generation.check import frames_for_seconds
from kinema.models.config import VideoVAEConfig
from tests.parity.case import Case, adapter
from tests.parity.exceptions import DEFECTS_NOT_COPIED

RELEASED_FPS = 24.0
"""Frames per second behind the named lengths of 1.2 (`4s`)."""


@adapter(r"opensora\.datasets\.aspect$", kind="json")
def aspect_tables(case: Case) -> None:
    table = case.table()
    assert table["ASPECT_RATIOS"]
    assert table["get_closest_ratio"]
    for name, want in table["ASPECT_RATIOS"].items():
        ours = NAMED[name]
        assert ours.pixels == want["pixels"], name
        pairs = [(float(key), tuple(size)) for key, size in want["table"].items()]
        assert list(zip(ours.ratios, ours.sizes, strict=True)) == pairs, name

    for height, width, keys in table["get_closest_ratio"]:
        for name, key in zip(table["closest_resolutions"], keys, strict=True):
            index = int(NAMED[name].closest(np.array([height]), np.array([width]))[0])
            assert NAMED[name].ratios[index] == float(key), (name, height, width)

    for aspect, key in table.get("ASPECT_RATIO_MAP", {}).items():
        height, width = size_for("720p", _flip(aspect))
        assert NAMED["720p"].sizes.index((height, width)) == _index("720p", key), aspect
    for name, aspect, want in table.get("get_image_size", []):
        _image_size(case, name, aspect, want)
    for length, want in table.get("get_num_frames", []):
        if not DEFECTS_NOT_COPIED.allows(case.official, f"frames {length}"):
            assert _num_frames(length) == want, length


def _index(name: str, key: str) -> int:
    return NAMED[name].ratios.index(float(key))


def _flip(aspect: str) -> str:
    """Height:width, as 1.x writes it, and width:height, as we do."""
    first, second = aspect.split(":")
    return f"{second}:{first}"


def _image_size(case: Case, name: str, aspect: str, want: list[int] | str) -> None:
    if DEFECTS_NOT_COPIED.allows(case.official, f"size {name} {aspect}"):
        return
    if isinstance(want, str):
        with pytest.raises(ConfigError):
            size_for(name, _flip(aspect))
    else:
        assert size_for(name, _flip(aspect)) == tuple(want), (name, aspect)
        assert _flip(aspect) in aspect_names(name)


def _num_frames(length: str | int) -> int:
    if isinstance(length, str) and length.endswith("s"):
        return frames_for_seconds(float(length[:-1]), RELEASED_FPS, VideoVAEConfig())
    return int(length)


@adapter(r"^\S+ Bucket$", kind="json")
def bucket_tables(case: Case) -> None:
    wanted = case.table()
    assert wanted
    for name, want in wanted.items():
        table = BucketTable(_settings(want["bucket_config"]))
        ordinals = {
            (found.name, length.frames): length.ordinal
            for found, lengths in table.levels
            for length in lengths
        }
        for resolution, lengths in want["ordinal"].items():
            for frames, ordinal in lengths.items():
                assert ordinals.pop((resolution, int(frames))) == ordinal, name
        assert not ordinals, name
        count = sum(len(found.sizes) * len(lengths) for found, lengths in table.levels)
        assert count == want["num_bucket"], name
        ours = {(b.resolution, b.frames, b.ratio): b for b in table.buckets}
        for resolution, frames, key, t, height, width, batch_size in want["table"]:
            bucket = ours[resolution, frames, float(key)]
            size = (bucket.frames, bucket.height, bucket.width, bucket.max_batch)
            assert size == (t, height, width, batch_size), name


@adapter(r"Bucket\.get_bucket_id$", kind="safetensors")
def bucket_ids(case: Case) -> None:
    tables = case.table(case.config["see"])
    samples = case.input("samples").numpy().astype(np.int64)
    frames, height, width, interval, seed = samples.T
    for name in case.group("out"):
        settings = _settings(tables[name]["bucket_config"])
        place = {(r, t, float(key)): i for i, (r, t, key, *_) in enumerate(tables[name]["table"])}
        got = np.full(len(samples), -1)
        for every in np.unique(interval):
            table = BucketTable(settings, int(every))
            rows = np.flatnonzero(interval == every)
            found = table.assign(
                frames[rows], height[rows], width[rows], _original_draw(seed), rows
            )
            for row, index in zip(rows, found, strict=True):
                if index >= 0:
                    b = table.buckets[index]
                    got[row] = place[b.resolution, b.frames, b.ratio]
        case.check(f"out.{name}", torch.from_numpy(got))


@adapter(r"VariableVideoBatchSampler$", kind="json")
def sampler_batches(case: Case) -> None:
    """Samples and batches per bucket. The order of batches, and so the hashes, are ours; what the
    original does on a resume is its own, ours is in tests/unit/data/test_order.py."""
    want = case.table()
    # Only the notes say which table of clips it was.
    sources = [e for e in case.siblings.values() if e["file"] in case.entry["notes"]]
    assert len(sources) == 1, case.entry["notes"]
    source = sources[0]
    columns = Case(case.folder, source, case.siblings)
    assert want["runs"]
    sizes = [columns.input(n).numpy() for n in ("num_frames", "height", "width")]
    for run in want["runs"]:
        table = BucketTable(
            _settings(want["configs"][run["config"]]), source["config"]["frame_interval"]
        )
        count = sum(len(found.sizes) * len(lengths) for found, lengths in table.levels)
        seed = run["seed"] + run["epoch"] + np.arange(len(sizes[0])) * count
        found = table.assign(*sizes, _original_draw(seed))
        samples = np.bincount(found[found >= 0], minlength=len(table.buckets))
        got = {
            (b.resolution, b.frames, b.ratio): int(samples[b.index])
            for b in table.buckets
            if samples[b.index]
        }
        assert got == {(r, t, float(k)): n for r, t, k, n in run["samples_per_bucket"]}
        _check_batches(run, table, samples.astype(np.int64))


def _check_batches(run: dict[str, Any], table: BucketTable, samples: NDArray[np.int64]) -> None:
    """Ours are the original's full batches and, per bucket, a smaller one where clips are left.

    The original drops what is left, or (drop_last false) fills it up with clips of the same bucket
    again, if they suffice for that.
    """
    limits = np.array([b.max_batch for b in table.buckets])
    ones = np.ones_like(limits)
    layout = lay_out(
        samples, limits, ones, world_size=1, accumulation=1, key=draws.key(run["seed"])
    )
    batches = Counter(layout.bucket.tolist())
    ours = np.array([batches[b.index] for b in table.buckets])
    left = samples % limits > 0
    full = ours - left
    assert np.array_equal(full, samples // limits)
    assert full.sum() == run["approximate_num_batch"]
    padded = left & (2 * samples >= limits)
    theirs = full + (0 if run["drop_last"] else padded)
    total = int(theirs.sum())
    per_rank = total // run["world_size"] if run["drop_last"] else -(-total // run["world_size"])
    assert {rank["num_batches"] for rank in run["ranks"]} == {per_rank}


def _settings(plain: dict[str, Any]) -> dict[str, Any]:
    """Bucket settings as JSON has them: pairs and lengths back to their types."""
    return {
        resolution: {
            int(frames): (tuple(p) if isinstance(p, list) else p, batch_size)
            for frames, (p, batch_size) in lengths.items()
        }
        for resolution, lengths in plain.items()
    }


def _original_draw(seed: NDArray[np.int64]) -> Draw:
    """The originals make a generator of (the sample's seed + ordinal) at every length."""

    def draw(rows: NDArray[np.int64], ordinal: int, nth: int) -> NDArray[np.float64]:
        return np.array(
            [np.random.default_rng(int(seed[r]) + ordinal).random(nth + 1)[nth] for r in rows]
        )

    return draw
