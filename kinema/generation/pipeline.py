"""The one path from a request to a finished clip."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from kinema.generation.clip import Clip
from kinema.generation.config import GenerateRequest, PipelineConfig


class Pipeline:
    """Text encoder, transformer, autoencoder and sampler of one checkpoint."""

    def __init__(self, config: PipelineConfig, checkpoint: Path) -> None:
        self.config = config
        self.checkpoint = checkpoint

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        vae: str | os.PathLike[str] | None = None,
        ema: bool = True,
        device: str | None = None,
        dtype: str = "fp32",
    ) -> Pipeline:
        raise NotImplementedError

    def generate(
        self,
        prompt: str,
        *,
        seconds: float | None = None,
        num_frames: int | None = None,
        width: int | None = None,
        height: int | None = None,
        fps: float | None = None,
        seed: int = 0,
        sample: int = 0,
        num_sampling_steps: int | None = None,
        cfg_scale: float | None = None,
    ) -> Clip:
        raise NotImplementedError

    def generate_batch(
        self,
        requests: Sequence[GenerateRequest],
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Clip]:
        raise NotImplementedError
