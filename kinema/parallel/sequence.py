"""Sequence parallelism: several ranks share the tokens of a clip.

Every rank holds some frames, so that attention within frames, attention to the text and the
feed-forward parts need no other rank. Around attention along time tokens change hands: a rank
gives away its frames of most places and gets all frames of some (dynamic sequence parallelism,
arXiv:2403.10266), one all-to-all each way. `docs/parallel.md` has the volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.config.errors import KinemaError
from kinema.models.frames import ALL_AT_HAND, Frames
from kinema.models.stdit import STDiT
from kinema.models.stdit2 import STDiT2
from kinema.models.stdit3 import STDiT3
from kinema.parallel.config import check_sharing
from kinema.parallel.world import TIMEOUT, World


class SequenceGroups:
    """Groups of 2, 4 … `most` neighbouring ranks, one of which shares each clip.

    Ranks r with equal `r // degree` are a group. Outside of `use` every rank is alone.

    Args:
        world: all ranks; each of them makes this object.
        most: ranks that share one clip at most, a power of two.
        timeout: how long a rank waits for the others of its group.

    Raises:
        KinemaError: the ranks cannot be dealt out to groups of that size.
    """

    def __init__(self, world: World, most: int = 1, *, timeout: timedelta = TIMEOUT) -> None:
        check_sharing(most, world.size)
        self._world = world
        self._groups: dict[int, dist.ProcessGroup] = {}
        self.degree = 1
        degree = 2
        while degree <= most:
            first = world.rank // degree * degree
            ranks = list(range(first, first + degree))
            # Only members wait for each other: 192 ranks have 168 groups of up to 8.
            group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            self._groups[degree] = group
            degree *= 2

    @contextmanager
    def use(self, degree: int) -> Iterator[None]:
        """Forward passes that begin herein are shared by `degree` ranks, all of which enter.

        Their backward passes may come later: what is recomputed is shared as it was.
        """
        before, self.degree = self.degree, degree
        try:
            yield
        finally:
            self.degree = before

    @property
    def rank(self) -> int:
        """This process among those that share with it, from 0."""
        return self._world.rank % self.degree

    def gather(self, value: Any) -> list[Any]:
        """Each sharing rank's `value` (picklable, small), by rank, on each of them."""
        if self.degree == 1:
            return [value]
        values: list[Any] = [None] * self.degree
        dist.all_gather_object(values, value, group=self._groups[self.degree])
        return values

    def stack(self, x: Tensor) -> Tensor:
        """Each sharing rank's tensor of one shape, by rank: `[...]` to `[degree, ...]`."""
        if self.degree == 1:
            return x[None]
        return _gathered(x, self._groups[self.degree], self.degree)

    def frames_of(self, frames: int) -> Frames:
        """This rank's part of a clip whose token grid has that many frames."""
        if self.degree == 1:
            return ALL_AT_HAND
        return SharedFrames(frames, self.degree, self.rank, self._groups[self.degree])

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroups:
        return self  # a copy of a model is shared by the same ranks


def share_frames(model: nn.Module, groups: SequenceGroups) -> None:
    """Let a finished model share its clips as `groups.use` says.

    Every rank of a group gets the whole output. If all differentiate the same loss, a rank's
    gradients (of parameters, and of the input) are the part of its own frames; summed over the
    group they are those of the whole.

    Args:
        model: STDiT, STDiT2 or STDiT3; changed in place, names in the state dict are not.

    Raises:
        KinemaError: another model.
    """
    if not isinstance(model, (STDiT, STDiT2, STDiT3)):
        raise KinemaError(
            f"{type(model).__name__} cannot share a clip among ranks: sequence parallelism deals "
            "out frames, which only the STDiT family attends to by space and time apart",
            where="parallel.sequence",
            hint="leave parallel.sequence out; shard: zero2 or zero3 and recompute save memory",
        )
    model.frames_of = groups.frames_of


@dataclass(frozen=True)
class SharedFrames(Frames):
    """One rank's part of `frames` frames: as many as every other rank's, the last ones padded."""

    frames: int
    """Of the whole clip, T."""
    degree: int
    rank: int
    group: dist.ProcessGroup

    @property
    def share(self) -> int:
        """Frames on each rank, t."""
        return -(-self.frames // self.degree)

    def split(self, x: Tensor, dim: int, step: int = 1) -> Tensor:
        """See `Frames.split`: t times `step` entries, zeros for what lies behind the clip."""
        size, length = x.shape[dim], self.share * step
        first = min(self.rank * length, size)
        part = x.narrow(dim, first, min(length, size - first))
        return _padded(part, dim, length)

    def join(self, x: Tensor) -> Tensor:
        """See `Frames.join`. The gradient of a rank's part is that of the whole, cut."""
        joined: Tensor = _Join.apply(x, self.group, self.rank, self.degree)
        return joined[:, : self.frames]

    def over_time(self, attention: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        """See `Frames.over_time`; of S places a rank attends at S / degree, rounded up."""
        if self.frames == 1:
            return super().over_time(attention, x, *rest)
        device, n, places = x.device.type, self.degree, x.shape[2]
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            # The projection behind would cast it as well; half as much is sent.
            x = x.to(torch.get_autocast_dtype(device))
        # A rank's parts for each other one, then each other one's part for it.
        parts = _padded(x, 2, -(-places // n) * n).unflatten(2, (n, -1)).permute(2, 0, 3, 1, 4)
        parts = _exchange(parts, self.group)  # [n, B, s, t, C]: all frames of s places
        by_place = parts.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.frames]
        along = attention(by_place.flatten(0, 1), *rest).view(by_place.shape)
        padded = _padded(along, 2, n * self.share)
        parts = _exchange(padded.unflatten(2, (n, -1)).permute(2, 0, 1, 3, 4), self.group)
        return parts.permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, :places]


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    """With zeros behind along `dim`, up to `length`."""
    missing = length - x.shape[dim]
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing]) if missing else x


def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[n, ...]`: part i goes to rank i, and comes from it."""
    out: Tensor = _Exchange.apply(x, group)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grads[0], ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # The functional form is an operation like others: selective recomputation can keep its result,
    # and compiled code can hold it.
    out: Tensor = collectives.wait_tensor(
        collectives.all_to_all_single(x.contiguous(), None, None, group)
    )
    return out


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, rank: int, degree: int) -> Tensor:
        ctx.part = rank * x.shape[1], x.shape[1]
        return _gathered(x, group, degree).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0].narrow(1, *ctx.part), None, None, None


def _gathered(x: Tensor, group: dist.ProcessGroup, degree: int) -> Tensor:
    out = x.new_empty((degree, *x.shape))
    dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
    return out
