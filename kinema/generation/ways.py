"""The ways to generate from images and videos, each as references and a mask strategy.

Only these two reach the engine; a way is a name for a common pair. What the published notes of
Open-Sora 1.1 call animating an image, extending, editing and connecting are the same pairs there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from kinema.config.errors import KinemaError
from kinema.diffusion.config import IDDPMConfig
from kinema.generation.config import PipelineConfig
from kinema.generation.mask_strategy import Placement, frames_beyond, notation
from kinema.generation.references import reference_length

File = str | os.PathLike[str]

EDIT_STRENGTH = 0.4
"""How much editing changes by default, as in the published example of 1.1."""


class WayError(KinemaError):
    """Ways that contradict one another, or that the model cannot go."""

    exit_code = 2


class Ways(TypedDict, total=False):
    """At most one of them; `edit_strength` goes with `edit`."""

    image: File | None
    """The clip begins with this image and brings it to life (image to video, animating)."""
    edit: File | None
    """The clip is this video, changed (video to video)."""
    edit_strength: float | None
    """0 keeps the video as it is, 1 makes a new one."""
    extend: File | None
    """The clip begins with the last frames of this video and goes on."""
    extend_back: File | None
    """The clip ends with the first frames of this video."""
    connect: tuple[File, File] | None
    """The clip goes from the end of the first to the start of the second; images or videos."""
    make_loop: File | None
    """The clip begins with the end of this video and ends with its start, so that it closes the
    circle; or it begins and ends with this image."""


@dataclass(frozen=True)
class Conditions:
    """What a way comes to."""

    references: tuple[str, ...]
    mask_strategy: str


def conditions(
    ways: Mapping[str, Any],
    config: PipelineConfig,
    *,
    num_frames: int,
    loop: int = 1,
    condition_frame_length: int | None = None,
) -> Conditions | None:
    """References and mask strategy of a way; None if no way is given.

    Args:
        ways: as `Ways`; what is None counts as not given.
        num_frames: frames of a segment.
        loop: number of segments. What a clip ends with goes to the last one.
        condition_frame_length: latent frames taken from a video's start or end, as far as it has
            them; default: `config.frames_taken_over`.

    Raises:
        WayError: several ways at once, a strength without a video to edit, or a clip that the
            files would fill.
        MediaError: a file that is missing, broken or no image or video.
    """
    given = {name: value for name, value in ways.items() if value is not None}
    strength = given.pop("edit_strength", None)
    unknown = given.keys() - Ways.__annotations__.keys()
    if unknown:
        raise WayError(f"there is no way {min(unknown)!r}", hint=", ".join(Ways.__annotations__))
    if len(given) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise WayError(
            f"{names} contradict each other",
            hint="one of them, or --reference-path and --mask-strategy, which can say anything",
        )
    if strength is not None and "edit" not in given:
        raise WayError("--edit-strength has no effect without --edit", hint="--edit VIDEO")
    if not given:
        return None
    vae = config.vae.config
    total = vae.latent_size(num_frames, vae.spatial_stride, vae.spatial_stride)[0]
    most = condition_frame_length
    if most is None:
        most = config.frames_taken_over
    name, value = next(iter(given.items()))

    def length(path: File) -> int:
        return min(reference_length(path, vae), most, total)

    first, last = 0, loop - 1
    placements: list[Placement]
    if name == "image":
        paths = [value]
        placements = [Placement()]
    elif name == "edit":
        paths = [value]
        kept = EDIT_STRENGTH if strength is None else strength
        new = total - (most if loop > 1 else 0)
        placements = _edit(reference_length(value, vae), total, new, loop, kept)
    elif name == "extend":
        paths = [value]
        k = length(value)
        placements = [Placement(first, 0, -k, 0, k)]
    elif name == "extend_back":
        paths = [value]
        k = length(value)
        placements = [Placement(last, 0, 0, -k, k)]
    elif name == "connect":
        paths = list(value)
        if len(paths) != 2:
            raise WayError(
                f"{len(paths)} given; two are connected", where="connect", hint="connect=(a, b)"
            )
        k, n = length(paths[0]), length(paths[1])
        placements = [Placement(first, 0, -k, 0, k), Placement(last, 1, 0, -n, n)]
    else:
        assert name == "make_loop"
        paths = [value]
        k = length(value)
        placements = [Placement(first, 0, -k, 0, k), Placement(last, 0, 0, -k, k)]
    taken = sum(p.length for p in placements)
    if name in ("extend", "extend_back", "connect", "make_loop") and loop == 1 and taken >= total:
        fewer, aligned = (total - 1) // len(placements), config.alignment(total) is not None
        raise WayError(
            f"the clip has room for {_frames(total)}, and {_frames(taken)} would be given: nothing "
            "would be new",
            where=f"--{name.replace('_', '-')}",
            hint=f"--num-frames {frames_beyond(taken, num_frames, vae)} or more"
            + (f", or --condition-frame-length {fewer}" if fewer and not aligned else ""),
        )
    return Conditions(tuple(os.fspath(p) for p in paths), notation(placements))


def _frames(count: int) -> str:
    return f"{count} latent frame{'' if count == 1 else 's'}"


def check_ways(config: PipelineConfig, sampler: str | None = None) -> None:
    """Refuse references and segments for a model or sampler that cannot keep frames.

    Args:
        sampler: in place of the one that the settings name.

    Raises:
        WayError: names what can.
    """
    if not config.model.uses_frame_mask:
        raise WayError(
            f"a model of type {config.model.type} makes each clip anew: it cannot be given frames",
            where="references",
            hint="a model of Open-Sora 1.0, 1.1 or 1.2 (stdit, stdit2, stdit3)",
        )
    process = config.diffusion
    if isinstance(process, IDDPMConfig) and (sampler or process.sampler) == "dpm-solver":
        raise WayError(
            "the sampler dpm-solver cannot keep frames",
            where="references",
            hint="--sampler iddpm",
        )


def _edit(there: int, total: int, new: int, loop: int, strength: float) -> list[Placement]:
    """The video's frames in order, over as many segments as there are: each segment goes on where
    the one before ended, less what it takes over."""
    placements = []
    for segment in range(loop):
        start = segment * new
        if start >= there:
            break
        length = min(total, there - start)
        placements.append(Placement(segment, 0, start, 0, length, strength))
    return placements
