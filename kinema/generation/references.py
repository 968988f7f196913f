"""The images and videos that frames are taken from: looked at first, read and encoded later.

`plan_references` needs no weights: it opens the files, works out how many latent frames each gives,
and refuses a mask strategy that they or the clip cannot meet. `ReferencePlan.encode` then reads
and encodes only what the strategy uses, piece by piece, so that a long video costs no more memory
than a short one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.mask_strategy import (
    MaskStrategyError,
    Placement,
    check,
    overlap_frames,
    parse,
    place,
)
from kinema.media.errors import MediaError
from kinema.media.image import read_image
from kinema.media.info import MediaInfo
from kinema.media.probe import probe
from kinema.media.read import read_frames
from kinema.media.transform import image_resize_crop, resize_crop
from kinema.models.config import VAEConfig

Encode = Callable[[Tensor], Tensor]
"""Pixels `[3, T, H, W]` in [-1, 1], float32 on the CPU, to normalised latents `[C, t, h, w]`."""

FRAMES_AT_ONCE = 16
"""Frames read and encoded at once by an autoencoder that takes each frame for itself."""


@dataclass(frozen=True)
class Reference:
    """An image or video, as much of it as the autoencoder can encode."""

    path: str
    kind: str
    """`image` or `video`."""
    first: int
    """First frame used."""
    num_frames: int
    """Frames used, from `first` on."""
    latent_frames: int
    """Latent frames that they make."""

    def pixels(self, start: int, stop: int, height: int, width: int) -> Tensor:
        """Frames `start` to `stop` (of those used), resized to cover the size and cropped to its
        middle as Open-Sora 1.2 does: `[3, stop - start, height, width]` in [-1, 1], float32.

        Raises:
            MediaError: the file cannot be decoded.
        """
        if self.kind == "image":
            return torch.from_numpy(image_resize_crop(read_image(self.path), (height, width)))
        frames = read_frames(self.path, range(self.first + start, self.first + stop))
        return torch.from_numpy(resize_crop(frames, (height, width)))


@dataclass(frozen=True)
class ReferencePlan:
    """What a request takes from references; made without reading weights or whole files."""

    placements: tuple[Placement, ...]
    references: tuple[Reference, ...]
    overlap: int
    """Latent frames that each segment takes over from the one before; 0 with one segment."""
    overlap_frames: int
    """Frames of the video that are cut off the start of every segment but the first."""
    align: int | None
    """`PipelineConfig.alignment` of a segment."""
    notes: tuple[str, ...]
    """What the person may not expect: other shapes, frames left out, moved starts."""

    def encode(
        self, encode: Encode, vae: VAEConfig, *, height: int, width: int
    ) -> tuple[Tensor, ...]:
        """Latents of the references, `[C, t, h, w]` each, float32 on the CPU.

        Frames that no placement uses are left zero and not read.

        Args:
            height: of the clip, in pixels; references are brought to its size.
        """
        return tuple(
            self._encode_one(number, encode, vae, height, width)
            for number in range(len(self.references))
        )

    def _encode_one(
        self,
        number: int,
        encode: Encode,
        vae: VAEConfig,
        height: int,
        width: int,
    ) -> Tensor:
        reference = self.references[number]
        used: set[int] = set()
        for p in self.placements:
            if p.reference == number:
                # The clip's end does not matter here: at worst a frame too many is read.
                span = place(p, reference.latent_frames, _ANY_LENGTH, self.align)
                used.update(range(span.reference_start, span.reference_start + span.length))
        size = vae.latent_size(reference.num_frames, height, width)
        latents = torch.zeros(vae.latent_channels, *size)
        step, frames_per_step = _piece(reference, vae)
        for piece in range(math.ceil(reference.latent_frames / step)):
            target = range(piece * step, min((piece + 1) * step, reference.latent_frames))
            if used.isdisjoint(target):
                continue
            start = piece * frames_per_step
            stop = min(start + frames_per_step, reference.num_frames)
            pixels = reference.pixels(start, stop, height, width)
            latents[:, target.start : target.stop] = encode(pixels).float().cpu()
        return latents


_ANY_LENGTH = 10**9
"""Stands for the latent frames of a clip where they do not matter."""


def plan_references(request: GenerateRequest, config: PipelineConfig) -> ReferencePlan:
    """Everything about a request's references, segments and mask strategy, checked.

    Raises:
        MaskStrategyError: a strategy that points outside the clip, its segments or its references;
            references that nothing uses; frames to take over that cannot be.
        MediaError: a file that is missing, broken or no image or video.
    """
    vae = config.vae.config
    total = vae.latent_size(request.num_frames, request.height, request.width)[0]
    align = config.alignment(total)
    placements = parse(request.mask_strategy)
    for path in request.references:
        if "://" in path:
            raise MaskStrategyError(
                "references are files on this machine", where=path, hint="download it first"
            )
    infos = [(path, probe(path)) for path in request.references]
    references, notes = [], []
    for number, (path, info) in enumerate(infos):
        uses = [p for p in placements if p.reference == number]
        if not uses:
            raise MaskStrategyError(
                f"reference {number} is given, but the mask strategy does not use it",
                where=path,
                hint=f"--mask-strategy 0,{number} begins the clip with it",
            )
        reference = _cut(path, info, vae, from_end=all(p.reference_start < 0 for p in uses))
        references.append(reference)
        moves = any(p.length > 1 for p in uses)
        notes += _notes(reference, info, request, config, moves=moves)
    notes += check(
        placements,
        reference_lengths=[r.latent_frames for r in references],
        latent_frames=total,
        loop=request.loop,
        align=align,
    )
    if request.loop == 1 and _keeps_everything(placements, references, total, align):
        notes.append("every frame is given by the references: nothing is generated")
    overlap, frames = segment_overlap(request, config)
    return ReferencePlan(placements, tuple(references), overlap, frames, align, tuple(notes))


def _keeps_everything(
    placements: Sequence[Placement], references: Sequence[Reference], total: int, align: int | None
) -> bool:
    kept = dict.fromkeys(range(total), False)
    for p in placements:
        span = place(p, references[p.reference].latent_frames, total, align)
        frames = range(span.target_start, span.target_start + span.length)
        kept |= dict.fromkeys(frames, p.edit_ratio == 0)
    return all(kept.values())


def segment_overlap(request: GenerateRequest, config: PipelineConfig) -> tuple[int, int]:
    """Latent frames that segments take over from the one before, and the frames these show.

    Both 0 with one segment.

    Raises:
        MaskStrategyError: that many cannot be taken over.
    """
    if request.loop == 1:
        return 0, 0
    length = request.condition_frame_length
    if length is None:
        length = config.frames_taken_over
    if config.align is not None and length % config.align:
        below = length // config.align * config.align
        above = below + config.align
        raise MaskStrategyError(
            f"this model takes frames over in steps of {config.align} latent frames, not {length}",
            where="condition_frame_length",
            hint=f"{below} or {above}" if below else str(above),
        )
    return length, overlap_frames(length, request.num_frames, config.vae.config)


def reference_length(path: str | os.PathLike[str], vae: VAEConfig) -> int:
    """Latent frames that a file gives; 1 for an image.

    Raises:
        MediaError: a file that is missing, broken or no image or video.
    """
    return _cut(str(path), probe(path), vae, from_end=False).latent_frames


def _cut(path: str, info: MediaInfo, vae: VAEConfig, *, from_end: bool) -> Reference:
    """As many frames as the autoencoder can encode whole: from the start, or, where only the end
    is used, from there."""
    if info.num_frames < 1:
        raise MediaError("no_frames", path)
    frames = vae.nearest_frames(info.num_frames)[0]
    latent = vae.latent_size(frames, vae.spatial_stride, vae.spatial_stride)[0]
    first = info.num_frames - frames if from_end else 0
    return Reference(path, info.kind, first, frames, latent)


def _piece(reference: Reference, vae: VAEConfig) -> tuple[int, int]:
    """Latent frames and frames that can be encoded apart from the rest, with the same result."""
    if vae.latent_chunk is not None and vae.micro_frame_size is not None:
        return vae.latent_chunk, vae.micro_frame_size
    if vae.time_stride == 1:
        return FRAMES_AT_ONCE, FRAMES_AT_ONCE
    return reference.latent_frames, reference.num_frames


def _notes(
    reference: Reference,
    info: MediaInfo,
    request: GenerateRequest,
    config: PipelineConfig,
    *,
    moves: bool,
) -> list[str]:
    """What the person may not expect of a file; `moves`: more is used of it than single frames."""
    notes = []
    name = os.path.basename(reference.path)
    # One pixel of rounding is no other shape.
    if abs(info.width * request.height - info.height * request.width) > max(
        info.width, info.height, request.width, request.height
    ):
        notes.append(
            f"{name} is {info.width}x{info.height}; it is resized to cover "
            f"{request.width}x{request.height} and cropped to its middle"
        )
    if not moves:
        return notes
    left_out = info.num_frames - reference.num_frames
    if left_out:
        which = "first" if reference.first else "last"
        notes.append(
            f"{name} has {info.num_frames} frames; the autoencoder takes {reference.num_frames}, "
            + (
                f"the {which} one is left out"
                if left_out == 1
                else f"the {which} {left_out} are not used"
            )
        )
    plays_at = config.played_fps(request.fps)
    if info.kind == "video" and info.fps and not math.isclose(info.fps, plays_at, rel_tol=0.02):
        notes.append(
            f"{name} plays at {info.fps:.4g} frames per second, the clip at {plays_at:.4g}: its "
            f"motion becomes {info.fps / plays_at:.2g} times as slow"
            if info.fps > plays_at
            else f"{name} plays at {info.fps:.4g} frames per second, the clip at {plays_at:.4g}: "
            f"its motion becomes {plays_at / info.fps:.2g} times as fast"
        )
    return notes
