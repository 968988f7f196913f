"""How a model is spread over the processes of a run."""

from __future__ import annotations

from typing import Literal

from kinema.config.errors import KinemaError
from kinema.config.settings import settings


@settings
class ParallelConfig:
    """Sharding and sequence parallelism. All by PyTorch: FSDP2, DeviceMesh, process groups."""

    shard: Literal["none", "zero2", "zero3"] = "none"
    """What the ranks share out among them: nothing (each holds all); optimizer state, averaged
    weights and gradients (zero2: weights are gathered once a step); or weights as well (zero3:
    each block's are gathered when it runs, forward and backward: less memory, more is sent)."""
    shard_over: Literal["all", "node"] | int = "all"
    """Ranks that hold one copy together: all; those of a machine, with a copy in each machine
    (hybrid: gathering stays inside the machine); or so many neighbouring ranks, or all where there
    are fewer."""
    sequence: int = 1
    """Sequence parallelism: the most ranks that share one clip, a power of two. Each bucket takes
    the fewest that leave `sequence_tokens` tokens of a clip on each; images are not shared."""
    sequence_tokens: int = 32768
    """Tokens of one clip that a rank takes before the clip is shared with others."""

    def __post_init__(self) -> None:
        if isinstance(self.shard_over, int) and self.shard_over < 2:
            raise ValueError(f"shard_over is {self.shard_over}; at least 2 ranks, or shard: none")
        if self.shard == "none" and self.shard_over != "all":
            raise ValueError("shard_over has no effect with shard: none; leave it out")
        if self.sequence < 1 or self.sequence & (self.sequence - 1):
            raise ValueError(f"sequence is {self.sequence}; it must be a power of two (1 is off)")
        if self.sequence_tokens < 1:
            raise ValueError(f"sequence_tokens is {self.sequence_tokens}; at least 1")
        if self.sequence == 1 and self.sequence_tokens != 32768:
            raise ValueError("sequence_tokens has no effect with sequence: 1; leave it out")

    def degree(self, tokens: int, frames: int) -> int:
        """Ranks that share a clip of so many tokens in so many latent frames, which are dealt out
        whole."""
        degree = 1
        most = min(self.sequence, frames)
        while degree < most and tokens > degree * self.sequence_tokens:
            degree *= 2
        return degree


def check_sharing(sequence: int, ranks: int) -> None:
    """Whether ranks can be dealt out to clips, `sequence` to one.

    Raises:
        KinemaError: they cannot.
    """
    if ranks % sequence:
        raise KinemaError(
            f"{sequence} ranks are to share a clip, which does not divide the run's {ranks}",
            where="parallel.sequence",
            hint=f"at most {ranks & -ranks} here, or a multiple of {sequence} ranks",
        )


def check_groups(over: int, ranks: int) -> None:
    """Whether ranks divide into groups of `over` that hold a copy together.

    Raises:
        KinemaError: they do not.
    """
    if over == 1 < ranks:
        raise KinemaError(
            "machines run one process each: there is none to share the weights with",
            where="parallel.shard_over",
            hint="shard_over: all, or shard: none",
        )
    if ranks % over:
        divisors = [str(n) for n in range(1, ranks + 1) if ranks % n == 0]
        raise KinemaError(
            f"{ranks} processes do not divide into groups of {over}",
            where="parallel.shard_over",
            hint=f"one of {', '.join(divisors[1:])}; or all",
        )
