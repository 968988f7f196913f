"""What is done with all clips at once: duplicates, concepts, expressions, at a given size.

    python benchmarks/curation_tables.py --clips 100000 --channels 512

Generated hashes: a tenth of the clips are copies of others, 0 to 6 bits away in each frame.
Generated embeddings lie around a thousand directions, and a tenth are copies as well.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.curation.config import DedupConfig
from kinema.curation.dedup import dedup
from kinema.data.expression import parse

RULES = (
    "aesthetic >= 4.5",
    "aesthetic >= 4.5 and file_size <= 50MB and 0.4 <= height / width <= 2.5",
    "not blank(text)",
    "words(text) >= 5",
    'matches(text, "(?i)watermark|subtitle")',
)
FRAMES = 5


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--clips", type=int, default=100_000)
    options.add_argument("--channels", type=int, default=0, help="of embeddings; 0: none")
    options.add_argument("--concepts", type=int, default=1000)
    asked = options.parse_args()
    random = np.random.default_rng(0)
    table = clips(asked.clips, random)
    for rule in RULES:
        best = min(seconds(lambda rule=rule: parse(rule).mask(table)) for _ in range(3))
        print(f"{best * 1e3:9.2f} ms  {rule}")
    copies = asked.clips // 10
    with timed(f"near duplicates of {asked.clips:,} clips"):
        found = dedup(table, None, DedupConfig())
    print(f"{pc.sum(pc.not_equal(found['duplicate_of'], '')).as_py():,} of {copies:,} found")
    if asked.channels:
        embeddings = directions(asked.clips, asked.channels, random)
        config = DedupConfig(concepts=asked.concepts, hash_distance=0)
        with timed(f"semantic duplicates and {asked.concepts} concepts"):
            found = dedup(table.drop_columns(["phash"]), embeddings, config)
        kept = np.asarray(pc.not_equal(found["similar_to"], ""))
        print(
            f"{kept[-copies:].sum():,} of {copies:,} copies found, {kept[:-copies].sum():,} others"
        )
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB at most")


def clips(count: int, random: np.random.Generator) -> pa.Table:
    """A table with hashes, numbers and captions."""
    copies = count // 10
    first = random.integers(0, 2**64, count, np.uint64)
    first[-copies:] = first[random.integers(0, count - copies, copies)]
    words = np.repeat(first[:, None], FRAMES, 1)
    shot = np.arange(FRAMES, dtype=np.uint64)  # frames of a shot differ in a few bits
    for step in (np.uint64(7), np.uint64(11), np.uint64(29)):
        words ^= np.uint64(1) << (first[:, None] >> step) % np.uint64(61) + shot % np.uint64(3)
    for _ in range(6):
        on = random.random((copies, FRAMES)) < 0.6
        bit = random.integers(0, 64, (copies, FRAMES)).astype(np.uint64)
        words[-copies:] ^= np.where(on, np.uint64(1) << bit, np.uint64(0))
    texts = np.array([f"{word:016x}" for word in words.ravel()]).reshape(count, FRAMES)
    caption = "a man in a red coat walks along a street in the rain while the camera pans left"
    return pa.table(
        {
            "id": [f"{i:032x}" for i in random.permutation(count)],
            "phash": [" ".join(row) for row in texts],
            "resolution": random.choice([1280 * 720, 1920 * 1080], count),
            "duration": np.full(count, 6.0),
            "aesthetic": random.normal(5, 1, count).astype(np.float32),
            "file_size": random.integers(10**5, 10**8, count),
            "height": random.choice([480, 720, 1080], count),
            "width": random.choice([480, 1280, 1920], count),
            "text": np.where(random.random(count) < 0.1, "", caption),
        }
    )


def directions(count: int, channels: int, random: np.random.Generator) -> pa.Array:
    """Embeddings as a column."""
    centres = random.normal(size=(1000, channels)).astype(np.float32)
    vectors = centres[random.integers(0, 1000, count)]
    vectors += random.normal(size=vectors.shape).astype(np.float32)
    copies = count // 10
    vectors[-copies:] = vectors[random.integers(0, count - copies, copies)]
    vectors[-copies:] += 0.1 * random.normal(size=(copies, channels)).astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), channels)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@contextmanager
def timed(what: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    print(f"{time.perf_counter() - begin:9.2f} s   {what}")


if __name__ == "__main__":
    main()
