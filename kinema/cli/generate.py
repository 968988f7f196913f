"""`kinema generate`: prompts in, videos out."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from kinema.generation.config import GenerateRequest
    from kinema.generation.pipeline import Pipeline


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    ckpt_path: Path = typer.Option(
        ..., help="A checkpoint folder, or a run folder (its newest checkpoint)."
    ),
    prompt: list[str] = typer.Option([], help="What the video shows; may be given repeatedly."),
    prompt_path: Path | None = typer.Option(None, help="A text file with one prompt per line."),
    resolution: str | None = typer.Option(None, help="A named size: 144p, 240p, 360p, 480p, 720p…"),
    aspect_ratio: str | None = typer.Option(
        None, help="WIDTH:HEIGHT of a named size; 16:9 is landscape and the default."
    ),
    size: str | None = typer.Option(None, help="WIDTHxHEIGHT in pixels, such as 1280x720."),
    num_frames: str | None = typer.Option(
        None, help="Frames (51), or seconds (4s: 102 frames at 24 per second); 1 makes an image."
    ),
    fps: float | None = typer.Option(None, help="Frames per second of the video."),
    num_sampling_steps: int | None = typer.Option(None, help="Steps from noise to video."),
    cfg_scale: float | None = typer.Option(None, help="Guidance by the prompt; 1 is none."),
    seed: int = typer.Option(42, help="The same seed gives the same video."),
    num_samples: int = typer.Option(1, min=1, help="Videos per prompt, each from its own noise."),
    batch_size: int = typer.Option(1, min=1, help="Videos sampled at once; does not change them."),
    save_dir: Path = typer.Option(Path("samples"), help="Where videos go; none is overwritten."),
    vae: Path | None = typer.Option(None, help="The autoencoder's weights, if they have moved."),
    ema: bool = typer.Option(True, help="Use the averaged weights."),
    dtype: str = typer.Option("fp32", help="Arithmetic of the transformer: fp32, bf16 or fp16."),
) -> None:
    """Make videos from prompts. What is not given is as the checkpoint was trained."""
    from kinema.generation.clip import free_name
    from kinema.generation.pipeline import Pipeline
    from kinema.telemetry.progress import Progress

    prompts = read_prompts(prompt, prompt_path)
    pipeline = Pipeline.from_pretrained(ckpt_path, vae=vae, ema=ema, dtype=dtype)
    width, height = choose_size(size, resolution, aspect_ratio, pipeline)
    seconds, frames = parse_length(num_frames)
    requests = [
        pipeline.request(
            text,
            seconds=seconds,
            num_frames=frames,
            width=width,
            height=height,
            fps=fps,
            seed=seed,
            sample=sample,
            num_sampling_steps=num_sampling_steps,
            cfg_scale=cfg_scale,
        )
        for text in prompts
        for sample in range(num_samples)
    ]
    _warn(pipeline, requests[0], prompts)
    pipeline.check(requests, batch_size=batch_size)
    pipeline.load()
    save_dir.mkdir(parents=True, exist_ok=True)
    total = len(requests) * requests[0].num_sampling_steps
    with Progress("sampling", total=total, unit="step") as bar:
        for clip in pipeline.generate_all(requests, batch_size=batch_size, on_step=bar.advance):
            print(clip.save(free_name(save_dir, clip.request)), flush=True)


def read_prompts(given: list[str], path: Path | None) -> list[str]:
    """Prompts from the command line, then those of a file, one per line, empty lines left out.

    Raises:
        KinemaError: no prompt at all, an empty one, or a file that cannot be read.
    """
    from kinema.config.errors import KinemaError

    if any(not text.strip() for text in given):
        raise KinemaError("the prompt is empty", where="--prompt", hint="say what is to be seen")
    prompts = [text.strip() for text in given]
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise KinemaError("is not a UTF-8 text file", where=str(path)) from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise KinemaError("holds no prompt", where=str(path), hint="one prompt per line")
        prompts += found
    if not prompts:
        raise KinemaError("no prompt", hint='--prompt "a red kite over the sea", or --prompt-path')
    return prompts


def parse_length(text: str | None) -> tuple[float | None, int | None]:
    """`4s` as (4.0, None) seconds, `51` as (None, 51) frames, nothing as (None, None).

    Raises:
        KinemaError: neither.
    """
    from kinema.config.errors import KinemaError

    if text is None:
        return None, None
    seconds = re.fullmatch(r"(\d+(?:\.\d+)?)\s*s", text.strip())
    if seconds:
        return float(seconds[1]), None
    if re.fullmatch(r"\d+", text.strip()):
        return None, int(text)
    raise KinemaError(
        f"{text!r} is no length", where="--num-frames", hint="51 (frames) or 4s (seconds)"
    )


def choose_size(
    size: str | None, resolution: str | None, aspect_ratio: str | None, pipeline: Pipeline
) -> tuple[int | None, int | None]:
    """(width, height) in pixels; (None, None) leaves the choice to the checkpoint.

    Sizes of the published tables that the autoencoder's stride does not divide are what they are
    in training: the autoencoder drops the rest.

    Raises:
        KinemaError: contradicting or unknown values; names those there are.
    """
    from kinema.config.errors import KinemaError
    from kinema.data.aspect import NAMED, aspect_names, size_for

    if size is not None:
        if resolution or aspect_ratio:
            raise KinemaError("--size leaves nothing to --resolution and --aspect-ratio to say")
        match = re.fullmatch(r"(\d+)[xX×](\d+)", size.strip())
        if match is None:
            raise KinemaError(f"{size!r} is no size", where="--size", hint="WIDTHxHEIGHT: 1280x720")
        return int(match[1]), int(match[2])
    if resolution is None:
        if aspect_ratio is not None:
            raise KinemaError("--aspect-ratio needs --resolution", hint="--resolution 240p")
        return None, None
    if aspect_ratio is None and resolution in NAMED:
        names = aspect_names(resolution)
        aspect_ratio = "16:9" if "16:9" in names else "1:1"
    height, width = size_for(resolution, aspect_ratio)
    if resolution not in NAMED:
        return width, height
    stride = pipeline.config.vae.config.spatial_stride
    whole = width // stride * stride, height // stride * stride
    if whole != (width, height):
        print(
            f"{resolution} {aspect_ratio} is {width}x{height}; with the autoencoder's stride of "
            f"{stride} that makes videos of {whole[0]}x{whole[1]}",
            file=sys.stderr,
        )
    return whole


def _warn(pipeline: Pipeline, request: GenerateRequest, prompts: list[str]) -> None:
    """Say on stderr what the person may not expect."""
    from kinema.generation.check import unseen_size_note

    note = unseen_size_note(request, pipeline.config)
    if note:
        print(f"warning: {note}", file=sys.stderr)
    for text in dict.fromkeys(prompts):
        lost = pipeline.lost_words(text)
        if lost:
            print(
                f"warning: the prompt is longer than the text encoder takes; this is lost: {lost}",
                file=sys.stderr,
            )
