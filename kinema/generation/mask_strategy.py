"""Which frames of which reference go where: the mask strategies of Open-Sora 1.1 and 1.2.

A strategy is `segment,reference,reference start,target start,length,edit ratio`, several joined by
`;`. What is left out at the end is 0,0,0,0,1,0. Starts and lengths count latent frames, negative
starts from the end. All of it is arithmetic on latents; `references.py` reads the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from kinema.config.errors import KinemaError
from kinema.models.config import VAEConfig

LatentShape = tuple[int, int, int, int]
"""Channels, frames, rows and columns of a latent."""


class MaskStrategyError(KinemaError):
    """A mask strategy that cannot be read, or that the clip or its references cannot meet."""

    exit_code = 2


@dataclass(frozen=True)
class Placement:
    """One entry of a mask strategy."""

    segment: int = 0
    reference: int = 0
    reference_start: int = 0
    target_start: int = 0
    length: int = 1
    edit_ratio: float = 0.0


@dataclass(frozen=True)
class Span:
    """A placement with its starts counted from 0, aligned, and its length cut to what there is."""

    reference_start: int
    target_start: int
    length: int


@dataclass(frozen=True)
class FrameConditioning:
    """What the references give to one segment."""

    latents: Tensor
    """`[C, T, H, W]` float32; zero in frames that no reference reaches."""
    mask: Tensor
    """`[T]` float32: 1 generates a frame, 0 keeps it, a value between is its edit ratio."""


def parse(text: str | None) -> tuple[Placement, ...]:
    """The entries of a strategy; none for an empty text.

    Only the form is checked; `check` knows the clip.

    Raises:
        MaskStrategyError: too many values, or one that is no number.
    """
    if not text:
        return ()
    return tuple(_parse_entry(entry, text) for entry in text.split(";"))


def notation(placements: Sequence[Placement]) -> str:
    """The text that `parse` reads."""
    return ";".join(",".join(_number(value) for value in astuple(p)) for p in placements)


def check(
    placements: Sequence[Placement],
    *,
    reference_lengths: Sequence[int],
    latent_frames: int,
    loop: int = 1,
    align: int | None = None,
) -> tuple[str, ...]:
    """Refuse what points outside the clip, its segments or its references.

    Args:
        reference_lengths: latent frames of each reference.
        latent_frames: of a segment.
        loop: number of segments.
        align: as for `condition`.

    Returns:
        Notes for the person: starts that alignment moves.

    Raises:
        MaskStrategyError: the first entry that cannot be met, with what is allowed.
    """
    notes = []
    for p in placements:
        _require(p, "segment", p.segment, 0, loop - 1, f"{_of(loop, 'segment')} (--loop)")
        if not reference_lengths:
            raise MaskStrategyError(
                "a mask strategy needs a reference, and none is given",
                where=_where(p),
                hint="--reference-path a.png, or no mask strategy",
            )
        count = len(reference_lengths)
        _require(p, "reference", p.reference, 0, count - 1, _of(count, "reference"))
        there = reference_lengths[p.reference]
        in_reference = f"the reference has {_of(there, 'latent frame')}"
        in_clip = f"a segment has {_of(latent_frames, 'latent frame')}"
        _require(p, "reference start", p.reference_start, -there, there - 1, in_reference)
        _require(p, "target start", p.target_start, -latent_frames, latent_frames - 1, in_clip)
        left_there = there - p.reference_start % there
        left_here = latent_frames - p.target_start % latent_frames
        _require(
            p,
            "length",
            p.length,
            1,
            min(left_there, left_here),
            f"from reference start {p.reference_start} on there {_are(left_there)}, "
            f"from target start {p.target_start} on there {_are(left_here)}",
        )
        if not 0 <= p.edit_ratio <= 1:
            raise MaskStrategyError(
                f"edit ratio is {p.edit_ratio:g}; 0 keeps the frames, 1 makes them anew",
                where=_where(p),
                hint="a number from 0 to 1",
            )
        span = place(p, there, latent_frames, align)
        meant = Span(p.reference_start % there, p.target_start % latent_frames, p.length)
        if span != meant:
            notes.append(
                f"mask strategy {notation([p])}: this model takes references in steps of {align} "
                f"latent frames; {span.length} from frame {span.reference_start} of the reference "
                f"{'go' if span.length > 1 else 'goes'} to frame {span.target_start} of the clip"
            )
    return tuple(notes)


def place(p: Placement, reference_length: int, latent_frames: int, align: int | None) -> Span:
    """Where a placement lies: negative starts counted from the end, both starts moved to the
    nearest multiple of `align`, the length cut to what reference and segment have.

    As `apply_mask_strategy` of Open-Sora 1.2.
    """
    reference_start, target_start = p.reference_start, p.target_start
    if reference_start < 0:
        reference_start += reference_length
    if target_start < 0:
        target_start += latent_frames
    if align is not None:
        reference_start = nearest_point(reference_start, align, reference_length)
        target_start = nearest_point(target_start, align, latent_frames)
    length = min(p.length, latent_frames - target_start, reference_length - reference_start)
    return Span(reference_start, target_start, length)


def nearest_point(value: int, point: int, maximum: int) -> int:
    """The multiple of `point` nearest to `value` that begins a whole stretch below `maximum`;
    halves go down."""
    count = value // point
    if value % point > point / 2 and count < maximum // point - 1:
        count += 1
    return count * point


def condition(
    placements: Sequence[Placement],
    references: Sequence[Tensor],
    segment: int,
    shape: LatentShape,
    align: int | None = None,
) -> FrameConditioning | None:
    """What the references give to a segment; None if nothing. A later entry wins over earlier ones.

    Args:
        references: latents `[C, t, H, W]`, as `Placement.reference` counts them.
        shape: of the segment's latent.
        align: starts are moved to multiples of this (`PipelineConfig.align`).
    """
    here = [p for p in placements if p.segment == segment]
    if not here:
        return None
    latents = torch.zeros(shape, dtype=torch.float32)
    mask = torch.ones(shape[1], dtype=torch.float32)
    for p in here:
        reference = references[p.reference]
        span = place(p, reference.shape[1], shape[1], align)
        target = slice(span.target_start, span.target_start + span.length)
        source = slice(span.reference_start, span.reference_start + span.length)
        latents[:, target] = reference[:, source].to(latents)
        mask[target] = p.edit_ratio
    return FrameConditioning(latents, mask)


def continue_from(
    placements: Sequence[Placement],
    references: Sequence[Tensor],
    previous: Tensor,
    segment: int,
    length: int,
    edit_ratio: float = 0.0,
) -> tuple[tuple[Placement, ...], tuple[Tensor, ...]]:
    """Let a segment start with the last frames of the one before.

    As `append_generated` of Open-Sora 1.2, which needs a reference to begin with; ours does not.

    Args:
        previous: latents `[C, T, H, W]` of the segment before, encoded from its decoded frames.
        segment: the one to come.
        length: latent frames taken over.

    Returns:
        Placements and references with the new ones at their ends.
    """
    added = Placement(segment, len(references), -length, 0, length, edit_ratio)
    return (*placements, added), (*references, previous)


def overlap_frames(length: int, num_frames: int, vae: VAEConfig) -> int:
    """Frames at the start of a segment that `length` latent frames of the last one already show.

    They are left out when segments are joined: `loop` segments make
    `loop * (num_frames - overlap) + overlap` frames (1.2 calls this `dframe_to_frame`).

    Args:
        length: latent frames taken over, `condition_frame_length`.
        num_frames: of a segment.

    Raises:
        MaskStrategyError: the autoencoder cannot cut there, or nothing would be new.
    """
    total = vae.latent_size(num_frames, vae.spatial_stride, vae.spatial_stride)[0]
    chunk = vae.micro_frame_size
    if chunk is not None and vae.latent_chunk is not None and num_frames >= chunk:
        step, frames_per_step = vae.latent_chunk, chunk
    elif vae.time_stride == 1:
        step = frames_per_step = 1
    else:
        # One chunk: its front is padded to whole latent frames, so the first one stands for less.
        if 0 < length < total:
            return num_frames - (total - length) * vae.time_stride
        step, frames_per_step = 1, vae.time_stride
    if length % step:
        near = [n for n in (length // step * step, (length // step + 1) * step) if n]
        fitting = [str(n) for n in near if n < total]
        raise MaskStrategyError(
            f"{length} latent frames cannot be cut off exactly; this autoencoder works in chunks "
            f"of {step}",
            where="condition_frame_length",
            hint=" or ".join(fitting)
            or f"{near[0]}, with segments of {frames_beyond(near[0], num_frames, vae)} frames "
            "(--num-frames) or more",
        )
    if length >= total:
        raise MaskStrategyError(
            f"a segment has {_of(total, 'latent frame')} and would take over {length}: nothing "
            "would be new",
            where="condition_frame_length",
            hint=(f"at most {total - step}, or " if total > step else "")
            + f"segments of {frames_beyond(length, num_frames, vae)} frames (--num-frames) or "
            "more",
        )
    return length // step * frames_per_step


def frames_beyond(length: int, num_frames: int, vae: VAEConfig) -> int:
    """The shortest clip, from `num_frames` on, of more than `length` latent frames."""
    while vae.latent_size(num_frames, vae.spatial_stride, vae.spatial_stride)[0] <= length:
        num_frames = vae.nearest_frames(num_frames + 1)[1]
    return num_frames


def _parse_entry(entry: str, text: str) -> Placement:
    values = entry.split(",")
    if len(values) > 6:
        raise MaskStrategyError(
            f"{entry!r} has {len(values)} values; there are six: segment, reference, reference "
            "start, target start, length, edit ratio",
            where=f"mask strategy {text!r}",
        )
    try:
        whole = [int(v) for v in values[:5]]
        ratio = float(values[5]) if len(values) == 6 else 0.0
    except ValueError:
        raise MaskStrategyError(
            f"{entry!r} is not numbers joined by commas",
            where=f"mask strategy {text!r}",
            hint="0 (the first reference's first frame begins the clip), or such as 0,0,-5,0,5,0.2",
        ) from None
    return replace(Placement(*whole), edit_ratio=ratio)


def _number(value: float) -> str:
    return str(value).removesuffix(".0")


def _require(p: Placement, name: str, value: int, low: int, high: int, reason: str) -> None:
    if not low <= value <= high:
        allowed = f"{low}" if low == high else f"from {low} to {high}"
        raise MaskStrategyError(
            f"{name} {value} is not there: {reason}", where=_where(p), hint=f"{name} {allowed}"
        )


def _where(p: Placement) -> str:
    return f"mask strategy {notation([p])}"


def _of(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {_of(count, 'latent frame')}"
