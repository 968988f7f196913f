"""Autoencoders in little memory: one sample at a time, and each in bands of rows.

Usual tiling cuts a frame into overlapping tiles and blends what comes out. Every tile then has its
own statistics in the group norms and its own attention, so colours differ from tile to tile, and
blending only hides the seams. Here the *layers* are computed in bands instead. A convolution reads
the rows beyond its band that it needs; a norm takes the statistics of the whole map, added up over
its bands. The result is that of the whole frame up to rounding, without seams to blend.

What is saved: activations, padding and the kernels' workspace exist for one band only; what stays
in memory are the maps between a norm and the next, at most three at a time. What it costs: next to
nothing, since no row is convolved twice. The price is that memory still grows with the frame (with
overlapping tiles it does not), by about 1.9 GiB for 1280x720 in float32 and half that in bf16.

The networks are not written twice. `BandedMap` stands in for a tensor: PyTorch hands it the few
functions that the networks call (`__torch_function__`), and it answers with another one that knows
how to compute any of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Rows = Callable[[int, int], Tensor]
"""Rows `start` to `stop` (exclusive) of a map: `[N, C, (T,) stop - start, W]`."""


def in_parts(
    network: Callable[[Tensor], Tensor], x: Tensor, *, size: int | None, rows: int | None
) -> Tensor:
    """What a network makes of `[N, ...]`, computed for some of N at a time.

    Args:
        network: only uses functions that `BandedMap` has.
        x: `[N, C, (T,) H, W]`.
        size: how many of N at once; None: all.
        rows: rows of a feature map that are computed at once; None: all of them.
    """

    def run(part: Tensor) -> Tensor:
        if rows is None:
            return network(part)
        banded = BandedMap.of(part, rows)
        return cast("BandedMap", network(cast("Tensor", banded))).tensor()

    count = len(x)
    size = min(size or count, count)
    result = run(x[:size])
    if size < count:  # one buffer for all: a list of parts would hold everything twice
        first, result = result, result.new_empty(count, *result.shape[1:])
        result[:size] = first
        for start in range(size, count, size):
            result[start : start + size] = run(x[start : start + size])
    return result


class BandedMap:
    """A feature map `[N, C, (T,) H, W]` whose rows are computed when they are asked for.

    `tensor()` computes all rows once, band by band, keeps them, and lets go of what they were made
    from. That happens where every row is needed at once or more than once: before a norm, before
    upsampling, before attention.

    Args:
        shape: of the whole map.
        rows: computes rows of it.
        band: how many at once.
        sources: the maps that `rows` reads.
        residual: the one of them of which row i is only read for row i. Adding is the last thing
            that happens to it, so its memory may be taken for this map.
    """

    def __init__(
        self,
        shape: Sequence[int],
        rows: Rows | None,
        band: int,
        sources: Sequence[BandedMap] = (),
        residual: BandedMap | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        self._rows = rows
        self._band = band
        self._sources = sources
        self._residual = residual
        self._tensor: Tensor | None = None
        self._ours = False
        """Whether the memory of `_tensor` was taken here, not given from outside."""

    @classmethod
    def of(cls, tensor: Tensor, band: int) -> BandedMap:
        whole = cls(tensor.shape, None, band)
        whole._tensor = tensor
        return whole

    def rows(self, start: int, stop: int) -> Tensor:
        if self._tensor is not None:
            return self._tensor[..., start:stop, :]
        assert self._rows is not None, "this map was a residual, and its memory is reused"
        return self._rows(start, stop)

    def bands(self) -> list[tuple[int, int]]:
        height = self.shape[-2]
        return [(a, min(a + self._band, height)) for a in range(0, height, self._band)]

    def tensor(self) -> Tensor:
        if self._tensor is not None:
            return self._tensor
        result: Tensor | None = None
        for start, stop in self.bands():
            part = self.rows(start, stop)
            if result is None:
                result = self._memory(part)
            result[..., start:stop, :] = part
        assert result is not None
        if self._residual is not None and self._residual._tensor is result:
            self._residual._tensor = None
        self._tensor, self._ours = result, True
        self._rows, self._sources, self._residual = None, (), None
        return result

    def _memory(self, first: Tensor) -> Tensor:
        """For all rows: that of the residual if nothing else needs it, else new."""
        given = self._residual
        if (
            given is not None
            and given._tensor is not None
            and given._ours
            and given._tensor.dtype == first.dtype
            and not torch.is_grad_enabled()
            and not any(s is not given and s._reads(given._tensor) for s in self._sources)
        ):
            return given._tensor
        if first.ndim == 4 and first.is_contiguous(memory_format=torch.channels_last):
            batch, channels, height, width = self.shape
            return first.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
        return first.new_empty(self.shape)

    def _reads(self, tensor: Tensor) -> bool:
        return self._tensor is tensor or any(source._reads(tensor) for source in self._sources)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> BandedMap:
        assert func in FUNCTIONS, f"{func} cannot be computed in bands"
        return FUNCTIONS[func](*args, **(kwargs or {}))

    # What networks call as methods. Dimensions that are not rows are the same in every band.

    def __add__(self, other: BandedMap | Tensor) -> BandedMap:
        term = other if isinstance(other, BandedMap) else BandedMap.of(other, self._band)
        assert term.shape == self.shape
        kept = [x for x in (self, term) if x._tensor is not None and x._ours]
        return BandedMap(
            self.shape,
            lambda start, stop: self.rows(start, stop) + term.rows(start, stop),
            self._band,
            sources=(self, term),
            residual=kept[0] if kept else None,
        )

    def __getitem__(self, index: tuple[slice, ...]) -> BandedMap:
        assert len(index) < len(self.shape) - 1, "rows are cut by bands only"
        return self._each(lambda x: x[index])

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> BandedMap:
        assert 0 <= dim < len(self.shape) - 2
        return self._each(lambda x: x.unflatten(dim, sizes))

    def transpose(self, dim: int, other: int) -> BandedMap:
        assert 0 <= min(dim, other) <= max(dim, other) < len(self.shape) - 2
        return self._each(lambda x: x.transpose(dim, other))

    def flatten(self, start: int, end: int = -1) -> BandedMap | Tensor:
        if end == -1:  # with the rows in it: whoever asks (attention) wants all of them
            return self.tensor().flatten(start)
        assert end < len(self.shape) - 2
        return self._each(lambda x: x.flatten(start, end))

    def _each(self, change: Callable[[Tensor], Tensor]) -> BandedMap:
        """The same view of every band, which leaves its rows in their place."""
        shape = change(torch.empty((), device="meta").expand(self.shape)).shape
        assert shape[-2] == self.shape[-2]
        return self._with(shape, lambda a, b: change(self.rows(a, b)))

    def _with(self, shape: Sequence[int], rows: Rows) -> BandedMap:
        """Another map that is computed from rows of this one."""
        return BandedMap(shape, rows, self._band, sources=(self,))

    def conv(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
    ) -> BandedMap:
        function: Callable[..., Tensor] = F.conv2d if weight.ndim == 4 else F.conv3d
        sizes = zip(self.shape[2:], weight.shape[2:], stride, padding, strict=True)
        shape = [(n + 2 * p - k) // s + 1 for n, k, s, p in sizes]
        kernel, step, around = weight.shape[-2], stride[-2], padding[-2]
        inner = (*padding[:-2], 0, padding[-1])  # rows beyond the map are added below

        def rows(start: int, stop: int) -> Tensor:
            first, last = start * step - around, (stop - 1) * step - around + kernel
            return function(self._rows_and_zeros(first, last), weight, bias, stride, inner)

        return self._with((self.shape[0], weight.shape[0], *shape), rows)

    def pad(self, spec: Sequence[int]) -> BandedMap:
        """Zeros around; `spec` as for `F.pad`: left, right, top, bottom, front, back."""
        left, right, top, bottom, *more = spec
        shape = list(self.shape)
        for i in range(len(spec) // 2):
            shape[-1 - i] += spec[2 * i] + spec[2 * i + 1]

        def rows(start: int, stop: int) -> Tensor:
            x = self._rows_and_zeros(start - top, stop - top)
            return F.pad(x, (left, right, 0, 0, *more))

        assert bottom >= 0
        return self._with(shape, rows)

    def _rows_and_zeros(self, start: int, stop: int) -> Tensor:
        """Rows, with zeros for those above the first and below the last."""
        height = self.shape[-2]
        x = self.rows(max(start, 0), min(stop, height))
        above, below = max(-start, 0), max(stop - height, 0)
        return F.pad(x, (0, 0, above, below)) if above or below else x

    def double(self) -> BandedMap:
        """Nearest neighbour to twice the height and width."""
        self.tensor()
        *most, height, width = self.shape

        def rows(start: int, stop: int) -> Tensor:
            first = start // 2
            part = F.interpolate(self.rows(first, (stop + 1) // 2), scale_factor=2.0)
            return part[..., start - 2 * first : stop - 2 * first, :]

        return self._with((*most, 2 * height, 2 * width), rows)

    def group_norm(self, groups: int, weight: Tensor, bias: Tensor, eps: float) -> BandedMap:
        self.tensor()
        mean, variance = self._moments(groups)
        # In float32 whatever the weights are, as PyTorch's own kernel does it.
        factor = (variance + eps).rsqrt().repeat_interleave(self.shape[1] // groups, dim=1)
        mean = mean.repeat_interleave(self.shape[1] // groups, dim=1)
        scale = factor * weight.float()
        shift = bias.float() - mean * scale
        scale, shift = (v.view(*v.shape, *[1] * (len(self.shape) - 2)) for v in (scale, shift))

        def rows(start: int, stop: int) -> Tensor:
            part = self.rows(start, stop)
            return torch.addcmul(shift, part, scale).to(part.dtype)

        return self._with(self.shape, rows)

    def _moments(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group over the whole map, float32 `[N, groups]`.

        Bands are joined by Chan's formula, which loses no digits where sums of squares would.
        """
        inner = tuple(range(2, len(self.shape)))
        count = 0
        mean = variance = torch.zeros(())
        for start, stop in self.bands():
            part = self.rows(start, stop).float()
            part_mean = part.mean(inner, keepdim=True)
            # Twice as fast on a CPU as `torch.var_mean`.
            part_variance = (part - part_mean).square().mean(inner, keepdim=True)
            count += stop - start
            share = (stop - start) / count
            if start == 0:
                mean, variance = part_mean, part_variance
                continue
            variance = variance.lerp(part_variance, share)
            variance = variance + (part_mean - mean).square() * (share * (1 - share))
            mean = mean.lerp(part_mean, share)
        mean, variance = (x.flatten(1).unflatten(1, (groups, -1)) for x in (mean, variance))
        whole = mean.mean(2)
        variance = (variance + (mean - whole[..., None]).square()).mean(2)
        return whole, variance


def _conv(
    x: BandedMap,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> BandedMap:
    assert (set(dilation), groups) == ({1}, 1)
    return x.conv(weight, bias, stride, padding)


def _pad(x: BandedMap, pad: Sequence[int], mode: str, value: float | None) -> BandedMap:
    assert (mode, value or 0) == ("constant", 0)
    return x.pad(pad)


def _silu(x: BandedMap, inplace: bool) -> BandedMap:
    return x._with(x.shape, lambda start, stop: F.silu(x.rows(start, stop)))


def _interpolate(x: BandedMap, *, scale_factor: float, mode: str, **others: Any) -> BandedMap:
    assert (scale_factor, mode) == (2.0, "nearest")
    return x.double()


def _add(x: BandedMap | Tensor, y: BandedMap | Tensor) -> BandedMap:
    return x + y if isinstance(x, BandedMap) else cast("BandedMap", y) + x


FUNCTIONS: dict[Callable[..., Any], Callable[..., BandedMap]] = {
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.pad: _pad,
    F.silu: _silu,
    F.interpolate: _interpolate,
    F.group_norm: BandedMap.group_norm,
    torch.Tensor.add: _add,
}
"""What PyTorch hands on when one of its functions meets a `BandedMap`."""
