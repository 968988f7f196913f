"""Settings of the data room: which clips train at which size, and how they are read."""

from __future__ import annotations

from typing import Literal

from kinema.config.settings import settings
from kinema.data.aspect import resolution

KeepProbability = float | tuple[float, float]
"""One probability of keeping a clip here, or a pair (keep, try): a clip first *tries* this length
with the second probability (else a shorter length is tried), and is then *kept* at this resolution
with the first (else a lower resolution is tried)."""

BucketSettings = tuple[KeepProbability, int | None]
"""(probability, batch size). The batch size is the most that one micro-batch holds; it may be null
where the probability is 0: such a bucket takes nothing, and its clips go to lower resolutions."""


@settings
class DataConfig:
    """The training data: manifest, buckets, reading."""

    path: str | None = None
    """Manifest (CSV or Parquet); usually given by `--data-path`."""
    root: str | None = None
    """Folder that the manifest's paths start from; the manifest's own folder by default."""
    buckets: dict[str, dict[int, BucketSettings]]
    """Resolution (`"480p"`, or WIDTHxHEIGHT) -> number of frames -> (probability, batch size)."""
    frame_interval: int = 1
    """Every how many-th frame of a clip is used."""
    tell_source_fps: bool = False
    """With a `frame_interval` above 1: tell the model the frame rate of the clip's file, as 1.1
    does, rather than that of the frames used."""
    transform: Literal["resize_crop"] = "resize_crop"
    """How a clip is brought to its bucket's size."""
    num_workers: int = 4
    """Decoding processes per rank."""
    decode_timeout_s: float = 60.0
    """A clip that takes longer to decode is skipped and reported, in seconds."""
    max_bad_fraction: float = 0.05
    """Training stops when more than this fraction of the clips asked for could not be read."""

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("needs at least one bucket")
        for name, lengths in self.buckets.items():
            resolution(name)
            if not lengths:
                raise ValueError(f"bucket {name} has no number of frames")
            for frames, (probability, batch_size) in lengths.items():
                _check_bucket(f"bucket {name}, {frames} frames", frames, probability, batch_size)
        if self.frame_interval < 1:
            raise ValueError(f"frame_interval is {self.frame_interval}, at least 1 is needed")
        if self.tell_source_fps and self.frame_interval == 1:
            raise ValueError("tell_source_fps has no effect with frame_interval: 1; leave it out")
        if self.num_workers < 1:
            raise ValueError(f"num_workers is {self.num_workers}, at least 1 is needed")
        if self.decode_timeout_s <= 0:
            raise ValueError(f"decode_timeout_s is {self.decode_timeout_s}, must be above 0")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}, must be in 0..1")


def _check_bucket(
    where: str, frames: int, probability: KeepProbability, batch_size: int | None
) -> None:
    if frames < 1:
        raise ValueError(f"{where}: at least 1 frame is needed")
    if isinstance(probability, tuple) and frames == 1:
        raise ValueError(f"{where}: images have one probability (a pair chooses among lengths)")
    pair = probability if isinstance(probability, tuple) else (probability,)
    if not all(0 <= p <= 1 for p in pair):
        raise ValueError(f"{where}: probability {probability} is not in 0..1")
    if batch_size is None and pair[0] > 0:
        raise ValueError(f"{where}: needs a batch size (only probability 0 goes without)")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"{where}: batch size {batch_size} is less than 1")
