"""A finished clip: its frames, the request it answers, and how it is put on disk."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kinema.checkpoint.disk import write_text
from kinema.config.errors import KinemaError
from kinema.config.settings import to_dict
from kinema.generation.config import GenerateRequest

SLUG_LENGTH = 60


@dataclass
class Clip:
    """A generated video or image.

    Attributes:
        frames: uint8 `[T, H, W, 3]`, RGB.
        request: what was asked for.
        record: what else made it (model, weights, versions, timings); goes to the sidecar.
        fps: frames per second that it plays at; None: the request's.
        number: which request of a call it answers, counted from 0.
    """

    frames: np.ndarray
    request: GenerateRequest
    record: dict[str, Any] = field(default_factory=dict)
    fps: float | None = None
    number: int = 0

    @property
    def suffix(self) -> str:
        """`.mp4`, or `.png` when there is one frame."""
        return ".mp4" if len(self.frames) > 1 else ".png"

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the clip, and beside it a `.json` with the whole request and record.

        Args:
            path: ends in `.mp4`, or in `.png` for a clip of one frame.
            overwrite: replace files that are there.

        Raises:
            KinemaError: wrong ending, or a file is there already.
        """
        from kinema.media.write import write_image, write_video

        path = Path(path)
        if path.suffix.lower() != self.suffix:
            kind = "a video" if self.suffix == ".mp4" else "an image (one frame)"
            raise KinemaError(
                f"{kind} is written as {self.suffix}, not as {path.suffix or 'a name without one'}",
                where=str(path),
                hint=str(path.with_suffix(self.suffix)),
            )
        sidecar = path.with_suffix(".json")
        for target in (path, sidecar):
            if target.exists() and not overwrite:
                raise KinemaError(
                    "is there already and is not overwritten",
                    where=str(target),
                    hint="another name, or save(..., overwrite=True)",
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.suffix == ".mp4":
            write_video(path, self.frames, self.fps or self.request.fps)
        else:
            write_image(path, self.frames[0])
        write_json(sidecar, {"request": to_dict(self.request), **self.record})
        return path


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON completely or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def slug(prompt: str) -> str:
    """A file name from a prompt: letters and digits of any script, at most 60 characters."""
    text = unicodedata.normalize("NFKC", prompt).lower()
    words = re.sub(r"[\W_]+", "-", text).strip("-")
    if len(words) > SLUG_LENGTH:
        cut = words[:SLUG_LENGTH]
        words = cut.rsplit("-", 1)[0] if "-" in cut[SLUG_LENGTH // 2 :] else cut
    return words or "clip"


def free_names(
    folder: Path, requests: Sequence[GenerateRequest], stems: Sequence[str] | None = None
) -> list[Path]:
    """A path for the clip of each request: `folder/a-red-kite-seed1.mp4`, with `-2` for the second
    sample of one prompt and seed, and `-again2`, `-again3` where an earlier run left files of that
    name or the same is asked for twice: nothing is overwritten.

    Args:
        stems: names without endings to take in place of those from the prompts.
    """
    if stems is None:
        stems = [default_stem(request) for request in requests]
    taken: set[str] = set()
    names = []
    for request, stem in zip(requests, stems, strict=True):
        suffix = ".mp4" if request.num_frames > 1 else ".png"
        name, again = stem, 1
        # A clip's sidecar has its name too, so that an image and a video cannot share one.
        while name in taken or any((folder / f"{name}{e}").exists() for e in (suffix, ".json")):
            again += 1
            name = f"{stem}-again{again}"
        taken.add(name)
        names.append(folder / f"{name}{suffix}")
    return names


def default_stem(request: GenerateRequest) -> str:
    """`a-red-kite-seed1`, with `-2` for the second sample."""
    sample = f"-{request.sample + 1}" if request.sample else ""
    return f"{slug(request.refined_from or request.prompt)}-seed{request.seed}{sample}"
