"""What a person may say of a video, and the checked request that it becomes: one list for Python,
the command line and everything else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from kinema.config.errors import KinemaError
from kinema.config.settings import from_dict, unknown_key_message
from kinema.diffusion.config import IDDPMConfig
from kinema.generation.check import RequestError, check_request, frames_for_seconds
from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.prompts import split_json, split_references
from kinema.generation.ways import WayError, Ways, conditions


class RequestOptions(Ways, total=False):
    """Keywords of `Pipeline.request` and `generate`; what is left out or None is as the checkpoint
    was trained. Fields of `GenerateRequest` of the same name say what each means; the ways to
    generate from images and videos are those of `Ways`."""

    seconds: float | None
    """Length, in place of `num_frames`."""
    num_frames: int | None
    width: int | None
    height: int | None
    fps: float | None
    seed: int
    sample: int
    num_sampling_steps: int | None
    sampler: Literal["iddpm", "dpm-solver"] | None
    cfg_scale: float | None
    negative_prompt: str | None
    refined_from: str | None
    aes: float | Literal["none"] | None
    """`none`: no score, also where the checkpoint has one of its own."""
    flow: float | None
    camera_motion: str | None
    references: Sequence[str | os.PathLike[str]] | str | None
    """Paths, or one text of paths joined by `;`."""
    mask_strategy: str | None
    loop: int
    condition_frame_length: int | None
    condition_frame_edit: float


def make_request(prompt: str, config: PipelineConfig, options: RequestOptions) -> GenerateRequest:
    """A request with the checkpoint's own defaults for whatever is not given, checked.

    Size and length default to the shape seen most in training.

    Raises:
        KinemaError: a value that cannot be met, with the nearest that can.
    """
    known = RequestOptions.__optional_keys__
    for name in options:
        if name not in known:
            raise RequestError(unknown_key_message(name, known), where="request")
    given: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
    ways = {name: given.pop(name) for name in Ways.__annotations__ if name in given}
    values = _shape(given, config) | _sampling(given, config)
    line = split_json(prompt)
    values["prompt"] = line.text.strip()
    aes = given.pop("aes", config.aes)
    values["aes"] = None if aes == "none" else aes
    given["references"] = _paths(given.get("references", ()))
    if line.references is not None:
        given["references"] = line.references
    if line.mask_strategy is not None:
        given["mask_strategy"] = line.mask_strategy
    way = conditions(
        ways,
        config,
        num_frames=values["num_frames"],
        loop=given.get("loop", 1),
        condition_frame_length=given.get("condition_frame_length"),
    )
    if way is not None:
        if given["references"] or given.get("mask_strategy"):
            raise WayError(
                f"{', '.join(ways)} and references contradict each other",
                where="references",
                hint="one of them",
            )
        given |= {"references": way.references, "mask_strategy": way.mask_strategy}
    elif given["references"] and "mask_strategy" not in given:
        # The usual meaning of a reference by itself: the clip begins with it.
        given["mask_strategy"] = "0"
    request = from_dict(GenerateRequest, _plain(given | values), where="request")
    check_request(request, config)
    return request


def _shape(given: dict[str, Any], config: PipelineConfig) -> dict[str, Any]:
    """Size, length and frame rate, taken out of what is given."""
    seconds, frames = given.pop("seconds", None), given.pop("num_frames", None)
    width, height = given.pop("width", None), given.pop("height", None)
    fps = given.pop("fps", config.fps)
    if seconds is not None and frames is not None:
        raise KinemaError("give seconds or num_frames, not both", where="length")
    if (width is None) != (height is None):
        raise KinemaError("give width and height together", where="size")
    if seconds is not None:
        frames = frames_for_seconds(seconds, fps, config.vae.config, config.frame_interval)
    if config.buckets:
        usual = config.buckets[0]
        frames = usual.num_frames if frames is None else frames
        width, height = (usual.width, usual.height) if width is None else (width, height)
    if width is None or height is None or frames is None:
        raise KinemaError(
            "the checkpoint does not say which sizes it was trained on",
            hint="give size and number of frames",
        )
    return {"width": width, "height": height, "num_frames": frames, "fps": fps}


def _sampling(given: dict[str, Any], config: PipelineConfig) -> dict[str, Any]:
    """Steps and guidance, taken out of what is given."""
    process = config.diffusion
    usual = process.num_sampling_steps
    if isinstance(process, IDDPMConfig):
        sampler = given.get("sampler", process.sampler)
        if sampler != process.sampler:
            # The checkpoint's number belongs to its own sampler.
            usual = 20 if sampler == "dpm-solver" else 100  # as published recipes have them
    return {
        "num_sampling_steps": given.pop("num_sampling_steps", usual),
        "cfg_scale": given.pop("cfg_scale", process.cfg_scale),
    }


def _paths(given: Sequence[str | os.PathLike[str]] | str) -> tuple[str, ...]:
    if isinstance(given, str):
        return split_references(given)
    return tuple(os.fspath(path) for path in given)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
