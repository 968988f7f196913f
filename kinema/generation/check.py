"""Whether a request can be met exactly, found out before any weights are read.

Nothing is rounded: a value that cannot be met is refused, with the nearest ones that can.
"""

from __future__ import annotations

from kinema.config.errors import KinemaError
from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.memory import MemoryEstimate
from kinema.models.config import VAEConfig


class RequestError(KinemaError):
    """A request that this checkpoint or this machine cannot meet as it stands."""

    exit_code = 2


def check_request(request: GenerateRequest, config: PipelineConfig) -> None:
    """Refuse sizes and lengths that the autoencoder cannot do exactly.

    Raises:
        RequestError: names the value and the nearest valid ones.
    """
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


def check_memory(estimate: MemoryEstimate, free: int, device: str) -> None:
    """Refuse work that needs more memory than is free.

    Args:
        estimate: of the batch at hand.
        free: bytes free on the device.

    Raises:
        RequestError: with the parts of the estimate.
    """
    if estimate.total > free:
        raise RequestError(
            f"this needs about {_gib(estimate.total)} ({estimate.describe()}), "
            f"and {_gib(free)} is free on {device}",
            where="memory",
            hint="a smaller batch size, size or number of frames",
        )


def frames_for_seconds(seconds: float, fps: float, vae: VAEConfig) -> int:
    """Frames that stand for a duration: one chunk of 17 frames for every 16 frame times.

    This is how Open-Sora 1.2 names its lengths at 24 frames per second: 2 s is 51 frames (three
    chunks), 4 s 102, 8 s 204, 16 s 408.

    Raises:
        RequestError: the duration is no whole number of chunks; names the nearest ones that are.
    """
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
            f"{seconds:g} s at {fps:g} frames per second is no whole number of the "
            f"autoencoder's chunks of {intervals / fps:.4g} s",
            where="num_frames",
            hint=" or ".join(near),
        )
    return whole * frames_per_chunk


def unseen_size_note(request: GenerateRequest, config: PipelineConfig) -> str | None:
    """A line for the person when the checkpoint never saw videos of this shape, else None."""
    wanted = (request.width, request.height, request.num_frames)
    if not config.buckets or any(
        (b.width, b.height, b.num_frames) == wanted for b in config.buckets
    ):
        return None
    seen = ", ".join(f"{b.width}x{b.height} {b.num_frames} frames" for b in config.buckets[:4])
    more = f" and {len(config.buckets) - 4} more" if len(config.buckets) > 4 else ""
    return (
        f"this checkpoint was not trained on {wanted[0]}x{wanted[1]} with {wanted[2]} frames "
        f"(it saw {seen}{more}); expect worse videos"
    )


def _around(value: int, step: int) -> str:
    below, above = value // step * step, (value // step + 1) * step
    return f"{below} or {above}" if below else f"{above}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
