"""Generated tables of clips shaped like public data sets: plans and benchmarks without the data.

What their own pages say (arXiv:2407.02371; arXiv:2407.06358), and round numbers of our own:

| | known | assumed |
|---|---|---|
| OpenVid-1M | 1,019,957 clips, 433,000 in 1080p | log-normal, 7.4 s on average; sizes and rates |
| MiraData-330k | 330,000 clips, 72 s on average | log-normal; 720p, 30 frames/s |
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest

OPENVID_CLIPS = 1_019_957
MIRADATA_CLIPS = 330_000
SIZES = {
    (1080, 1920): 0.30, (720, 1280): 0.36, (2160, 3840): 0.03, (1920, 1080): 0.05,
    (1280, 720): 0.05, (720, 960): 0.04, (1080, 1440): 0.03, (720, 720): 0.02,
    (1024, 1024): 0.03, (534, 1280): 0.03, (816, 1920): 0.02, (512, 910): 0.02,
    (480, 640): 0.02,
}  # fmt: skip
"""(height, width): share of OpenVid-like clips."""
DATA_SETS = ("openvid", "openvid+miradata")

Sizes = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
"""Frames, heights and widths of clips."""


def openvid_like(rows: int, images: float = 0.0, seed: int = 0) -> Sizes:
    """Sizes of `rows` clips, of which the fraction `images` are images."""
    random = np.random.default_rng(seed)
    sizes = np.array(list(SIZES))
    size = sizes[random.choice(len(sizes), rows, p=list(SIZES.values()))]
    seconds = np.exp(random.normal(np.log(6.5), 0.55, rows)).clip(1.5, 60)
    rate = random.choice([24, 25, 30, 60], rows, p=[0.25, 0.25, 0.4, 0.1])
    frames = np.maximum((seconds * rate).astype(np.int64), 2)
    frames[random.random(rows) < images] = 1
    return frames, size[:, 0], size[:, 1]


def miradata_like(rows: int, seed: int = 0) -> Sizes:
    """Sizes of `rows` long clips: 1280x720, 30 frames/s, 72 s on average."""
    random = np.random.default_rng(seed)
    deviation = 0.6
    seconds = np.exp(random.normal(np.log(72.1) - deviation**2 / 2, deviation, rows)).clip(4, 600)
    return (seconds * 30).astype(np.int64), np.full(rows, 720), np.full(rows, 1280)


def manifest_like(name: str, scale: float = 1.0) -> Manifest:
    """A manifest of clips that do not exist.

    Args:
        name: one of `DATA_SETS`.
        scale: how many times as many clips.

    Raises:
        KinemaError: there is no such data set here.
    """
    if name not in DATA_SETS:
        raise KinemaError(
            f"nothing is known of data like {name!r}",
            where="--like",
            hint=f"one of {', '.join(DATA_SETS)}; or --manifest",
        )
    parts = [openvid_like(max(1, round(OPENVID_CLIPS * scale)))]
    if name.endswith("miradata"):
        parts.append(miradata_like(max(1, round(MIRADATA_CLIPS * scale))))
    frames, height, width = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    names = pa.repeat(pa.scalar("generated", pa.large_string()), len(frames))
    return Manifest.from_columns(
        {
            "path": names,
            "text": names,
            "num_frames": frames,
            "height": height,
            "width": width,
            "fps": np.full(len(frames), 30.0),
        },
        ".",
    )
