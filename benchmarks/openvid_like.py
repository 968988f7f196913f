"""A generated table of clips shaped like OpenVid-1M, for benchmarks and tests without the data.

Shares of sizes, frame rates and durations are round numbers of our own, made to look like what
that data set's paper shows: high-definition landscape clips of two to some twenty seconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZES = {
    (1080, 1920): 0.30, (720, 1280): 0.36, (2160, 3840): 0.03, (1920, 1080): 0.05,
    (1280, 720): 0.05, (720, 960): 0.04, (1080, 1440): 0.03, (720, 720): 0.02,
    (1024, 1024): 0.03, (534, 1280): 0.03, (816, 1920): 0.02, (512, 910): 0.02,
    (480, 640): 0.02,
}  # fmt: skip
"""(height, width): share."""


def openvid_like(
    rows: int, images: float = 0.0, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Frames, heights and widths of `rows` clips, of which the fraction `images` are images."""
    random = np.random.default_rng(seed)
    sizes = np.array(list(SIZES))
    size = sizes[random.choice(len(sizes), rows, p=list(SIZES.values()))]
    seconds = np.exp(random.normal(np.log(6.5), 0.55, rows)).clip(1.5, 60)
    rate = random.choice([24, 25, 30, 60], rows, p=[0.25, 0.25, 0.4, 0.1])
    frames = np.maximum((seconds * rate).astype(np.int64), 2)
    frames[random.random(rows) < images] = 1
    return frames, size[:, 0], size[:, 1]
