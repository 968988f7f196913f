"""Reading a 10 s 1280x720 H.264 clip: `python benchmarks/decode.py [--repeats 3]`.

The clip (300 frames at 30 fps, a key frame at least every 30, with noise and moving shapes) is
written with `write_video` to a temporary folder. Prints one markdown table of frames per second of
wall clock, the best of the repeats, with one decoder thread:

- *all in order*: every frame, as RGB, one at a time;
- *32 random*: 32 frames drawn over the whole clip, asked for unsorted in one call;
- *32 consecutive*: a window from a random start, as training reads;
- *32 consecutive, to 448x256*: the same through the training transform;
- *pool of 2*: the same for 16 windows, in two decode workers, results back in this process.
"""

from __future__ import annotations

import argparse
import platform
import random
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import av
import numpy as np

from kinema.media.clip import load_clip
from kinema.media.pool import DecodePool
from kinema.media.read import iter_frames, read_frames
from kinema.media.write import write_video

FRAMES, HEIGHT, WIDTH, FPS = 300, 720, 1280, 30
SIZE = (256, 448)
WINDOW = 32
POOL_WINDOWS = 16


def make_clip(path: Path) -> None:
    """Gradients, noise and two moving blocks: about as hard to code as real footage."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    ground = np.stack([x * 160 // WIDTH, y * 160 // HEIGHT, (x + y) * 160 // (WIDTH + HEIGHT)], -1)
    noise = generator.normal(30, 6, (8, HEIGHT, WIDTH, 1))
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(FRAMES):
        frames[t] = np.clip(ground + noise[t % 8], 0, 255)
        left, top = 5 * t % (WIDTH - 200), 3 * t % (HEIGHT - 150)
        frames[t, top : top + 150, left : left + 200] = (230, 60, 40)
        frames[t, 300:380, WIDTH - 120 - left // 2 : WIDTH - left // 2] = (40, 90, 220)
    write_video(path, frames, FPS, crf=23)


def best_rate(read: Callable[[], int], repeats: int) -> float:
    """Frames per second of the fastest of `repeats` calls."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        count = read()
        rates.append(count / (time.perf_counter() - start))
    return max(rates)


def measure(path: Path, repeats: int) -> dict[str, float]:
    draw = random.Random(0)

    def windows(count: int) -> list[list[int]]:
        starts = [draw.randrange(FRAMES - WINDOW) for _ in range(count)]
        return [list(range(s, s + WINDOW)) for s in starts]

    def in_order() -> int:
        return sum(1 for _ in iter_frames(path))

    def scattered() -> int:
        return len(read_frames(path, draw.sample(range(FRAMES), WINDOW)))

    def window() -> int:
        return len(read_frames(path, windows(1)[0]))

    def transformed() -> int:
        return int(load_clip(path, windows(1)[0], SIZE).shape[1])

    rates = {
        "all in order": best_rate(in_order, repeats),
        f"{WINDOW} random": best_rate(scattered, repeats),
        f"{WINDOW} consecutive": best_rate(window, repeats),
        f"{WINDOW} consecutive, to {SIZE[1]}x{SIZE[0]}": best_rate(transformed, repeats),
    }
    with DecodePool(2, timeout_s=300) as pool:

        def call(indices: list[int]) -> tuple[Any, ...]:
            return path, indices, SIZE

        def pooled() -> int:
            count = 0
            for _, clip in pool.map(load_clip, windows(POOL_WINDOWS), call=call):
                if isinstance(clip, Exception):
                    raise clip
                count += clip.shape[1]
            return count

        pooled()  # the workers start
        rates["pool of 2"] = best_rate(pooled, repeats)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        make_clip(path)
        megabits = path.stat().st_size * 8 / 1e6 / (FRAMES / FPS)
        print(
            f"{date.today()}, {platform.machine()}, PyAV {av.__version__}, {megabits:.1f} Mbit/s\n"
        )
        print("| read | frames/s |")
        print("|---|---|")
        for name, rate in measure(path, args.repeats).items():
            print(f"| {name} | {rate:.0f} |")


if __name__ == "__main__":
    main()
