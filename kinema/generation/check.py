"""Whether a request can be met exactly, found out before any weights are read.

Nothing is rounded: a value that cannot be met is refused, with the nearest ones that can.
"""

from __future__ import annotations

import dataclasses

from kinema.config.errors import KinemaError
from kinema.diffusion.config import IDDPMConfig, ProcessConfig
from kinema.generation.config import GenerateRequest, PipelineConfig, TrainedSize
from kinema.generation.prompts import segment_texts
from kinema.generation.references import ReferencePlan, plan_references
from kinema.generation.ways import check_ways
from kinema.models.config import ClassTextConfig, VAEConfig
from kinema.models.text_classes import ClassTextEncoder


class RequestError(KinemaError):
    """A request that this checkpoint or this machine cannot meet as it stands."""

    exit_code = 2


def check_request(request: GenerateRequest, config: PipelineConfig) -> ReferencePlan:
    """Refuse what this model cannot do, or can do only differently.

    Returns:
        What the request takes from references, as `plan_references` has it.

    Raises:
        KinemaError: names the value and the nearest valid ones.
    """
    _check_size(request, config)
    _check_sampling(request, config)
    _check_text(request, config)
    if request.references or request.mask_strategy or request.loop > 1:
        check_ways(config, request.sampler)
    if request.loop == 1:
        if request.condition_frame_edit:
            raise _without_effect("condition_frame_edit", "several segments (--loop)")
        if request.condition_frame_length is not None and not request.references:
            raise _without_effect(
                "condition_frame_length", "several segments (--loop) or a video to go on from"
            )
    return plan_references(request, config)


def process_config(request: GenerateRequest, config: PipelineConfig) -> ProcessConfig:
    """The diffusion process of a request: the checkpoint's, with the request's sampler.

    Raises:
        RequestError: the process has no such sampler.
    """
    if request.sampler is None:
        return config.diffusion
    if not isinstance(config.diffusion, IDDPMConfig):
        raise RequestError(
            f"the sampler {request.sampler} is for models trained with IDDPM; this one was trained "
            "with rectified flow",
            where="sampler",
            hint="no --sampler: rectified flow has one",
        )
    return dataclasses.replace(config.diffusion, sampler=request.sampler)


def _check_sampling(request: GenerateRequest, config: PipelineConfig) -> None:
    process = process_config(request, config)
    if isinstance(process, IDDPMConfig) and request.num_sampling_steps > process.num_timesteps:
        raise RequestError(
            f"{request.num_sampling_steps} steps are more than the {process.num_timesteps} the "
            "model was trained with",
            where="num_sampling_steps",
            hint=f"1 to {process.num_timesteps}",
        )
    if request.negative_prompt is not None and request.cfg_scale == 1:
        raise _without_effect("negative_prompt", "guidance (cfg_scale other than 1)")


def _check_text(request: GenerateRequest, config: PipelineConfig) -> None:
    text = config.text.config
    if not isinstance(text, ClassTextConfig):
        segment_texts(request)
        return
    for name in ("aes", "flow", "camera_motion", "negative_prompt"):
        if getattr(request, name) is not None:
            raise _without_effect(name, "a model that takes text; this one takes a class number")
    ClassTextEncoder(text).encode([request.prompt])


def _without_effect(name: str, needed: str) -> RequestError:
    return RequestError(f"{name} has no effect without {needed}", hint=f"leave {name} out")


def _check_size(request: GenerateRequest, config: PipelineConfig) -> None:
    stride = config.vae.config.spatial_stride
    for name in ("width", "height"):
        value = getattr(request, name)
        if value % stride:
            near = _around(value, stride)
            raise RequestError(
                f"{name} {value} is not a multiple of {stride}, the autoencoder's stride",
                where="size",
                hint=f"{name} {near}",
            )
        if request.num_frames > 1 and value % 2:
            # H.264 in yuv420p stores colour at half resolution.
            raise RequestError(
                f"{name} {value} is odd, which mp4 video cannot hold",
                where="size",
                hint=f"{name} {_around(value, 2 * stride)}",
            )
    below, above = config.vae.config.nearest_frames(request.num_frames)
    if below != above:
        raise RequestError(
            f"{request.num_frames} frames cannot be made exactly by this autoencoder",
            where="num_frames",
            hint=f"{below} or {above} frames",
        )


def frames_for_seconds(seconds: float, fps: float, vae: VAEConfig, frame_interval: int = 1) -> int:
    """Frames that stand for a duration, counted as the models' authors did.

    Open-Sora 1.2: one chunk of 17 frames for every 16 frame times; at 24 frames per second 2 s is
    51 frames (three chunks), 4 s 102, 8 s 204, 16 s 408. Open-Sora 1.1 has no chunks and plays
    every third frame of 24 per second: 2 s is 16 frames, 4 s 32, 8 s 64, 16 s 128. Open-Sora 1.0
    plays 8 per second: 2 s is 16 frames.

    Args:
        fps: as the model is told.
        frame_interval: `PipelineConfig.frame_interval`.

    Raises:
        RequestError: the duration is no whole number of chunks; names the nearest ones that are.
    """
    fps = fps if frame_interval == 1 else fps // frame_interval
    chunk = vae.micro_frame_size
    frames_per_chunk, intervals = (1, 1) if chunk in (None, 1) else (chunk, chunk - 1)
    chunks = seconds * fps / intervals
    whole = round(chunks)
    if whole < 1 or abs(chunks - whole) > 1e-6 * whole:
        count = max(int(chunks), 0)
        near = [
            f"{n * frames_per_chunk} frames ({n * intervals / fps:.4g} s)"
            for n in (count, count + 1)
            if n > 0
        ]
        raise RequestError(
            f"{seconds:g} s at {fps:g} frames per second is no whole number of "
            + (
                "frames"
                if intervals == 1
                else f"the autoencoder's chunks of {intervals / fps:.4g} s"
            ),
            where="num_frames",
            hint=" or ".join(near),
        )
    return whole * frames_per_chunk


def unseen_size_note(request: GenerateRequest, config: PipelineConfig) -> str | None:
    """A line for the person when the checkpoint never saw videos of this shape, else None."""
    wanted = (request.width, request.height, request.num_frames)

    def is_like(bucket: TrainedSize) -> bool:
        if config.any_aspect_ratio and bucket.num_frames == request.num_frames:
            # Sizes of one named resolution differ by this much where strides cut them.
            area = bucket.width * bucket.height
            return abs(request.width * request.height - area) <= 0.1 * area
        return (bucket.width, bucket.height, bucket.num_frames) == wanted

    if not config.buckets or any(is_like(bucket) for bucket in config.buckets):
        return None
    seen = ", ".join(f"{b.width}x{b.height} {b.num_frames} frames" for b in config.buckets[:4])
    more = f" and {len(config.buckets) - 4} more" if len(config.buckets) > 4 else ""
    length = "1 frame" if request.num_frames == 1 else f"{request.num_frames} frames"
    return (
        f"this checkpoint was not trained on {request.width}x{request.height} with {length} "
        f"(it saw {seen}{more}); expect worse videos"
    )


def _around(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return f"{below} or {above}" if below else f"{above}"
