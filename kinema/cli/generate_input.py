"""What the arguments of `kinema generate` mean: prompts, sizes, lengths, references per prompt."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kinema.generation.config import PipelineConfig
    from kinema.generation.prompts import PromptLine
    from kinema.generation.refine import RefineConfig


def read_lines(given: list[str], path: Path | None) -> list[PromptLine]:
    """Prompts from the command line, then those of a file, empty lines left out.

    Raises:
        KinemaError: no prompt at all, an empty one, or a file that cannot be read.
    """
    from kinema.config.errors import KinemaError
    from kinema.generation.prompts import read_prompts, split_json

    lines = [split_json(text.strip()) for text in given]
    if any(not line.text.strip() for line in lines):
        raise KinemaError("the prompt is empty", where="--prompt", hint="say what is to be seen")
    if path is not None:
        lines += read_prompts(path)
    if not lines:
        raise KinemaError("no prompt", hint='--prompt "a red kite over the sea", or --prompt-path')
    return lines


def per_prompt(values: list[str], count: int, flag: str) -> list[str | None]:
    """One value for each prompt: one given goes for all, several are one each.

    Raises:
        KinemaError: another number of them.
    """
    from kinema.config.errors import KinemaError

    if not values:
        return [None] * count
    if len(values) == 1:
        return [values[0]] * count
    if len(values) != count:
        raise KinemaError(
            f"{len(values)} given for {count} prompt" + ("" if count == 1 else "s"),
            where=flag,
            hint="one for all prompts, or one for each; several references of one prompt are "
            "joined: a.png;b.mp4",
        )
    return list(values)


def parse_connect(values: list[str]) -> tuple[str, str] | None:
    """`--connect A --connect B`, or `--connect A,B`.

    Raises:
        KinemaError: not two files.
    """
    from kinema.config.errors import KinemaError

    if not values:
        return None
    files = values
    if len(values) == 1 and not Path(values[0]).exists():
        files = [part.strip() for part in values[0].split(",")]
    if len(files) != 2 or not all(files):
        raise KinemaError(
            f"two images or videos are connected, not {len(files)}",
            where="--connect",
            hint="--connect a.png --connect b.png",
        )
    return files[0], files[1]


def refine_config(
    endpoint: str | None, model: str | None, key_env: str, config: PipelineConfig
) -> RefineConfig | None:
    """Settings of the language model that refines prompts; None if none does.

    Raises:
        KinemaError: half of them, an address that is none, or prompts that are class numbers.
    """
    from kinema.config.errors import KinemaError
    from kinema.config.settings import from_dict
    from kinema.generation.refine import RefineConfig
    from kinema.models.config import ClassTextConfig

    if endpoint is None:
        if model is not None:
            raise KinemaError("--refine-model has no effect without --refine", hint="leave it out")
        return None
    if isinstance(config.text.config, ClassTextConfig):
        raise KinemaError("--refine has no effect on class numbers", hint="leave it out")
    if model is None:
        raise KinemaError("--refine needs the language model's name", hint="--refine-model NAME")
    values = {"endpoint": endpoint, "model": model, "api_key_env": key_env}
    return from_dict(RefineConfig, values, where="--refine")


def parse_aes(text: str | None) -> float | str | None:
    """A score; `none` where the checkpoint's own is not wanted either.

    Raises:
        KinemaError: neither.
    """
    from kinema.config.errors import KinemaError

    if text is None or text == "none":
        return text
    try:
        return float(text)
    except ValueError:
        raise KinemaError(f"{text!r} is no score", where="--aes", hint="6.5, or none") from None


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
    size: str | None, resolution: str | None, aspect_ratio: str | None, config: PipelineConfig
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
    stride = config.vae.config.spatial_stride
    whole = width // stride * stride, height // stride * stride
    if whole != (width, height):
        print(
            f"{resolution} {aspect_ratio} is {width}x{height}; with the autoencoder's stride of "
            f"{stride} that makes videos of {whole[0]}x{whole[1]}",
            file=sys.stderr,
        )
    return whole
