"""The one path from a request to a finished clip."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import numpy as np
import psutil
import torch
from torch import Tensor

import kinema
from kinema.config.errors import KinemaError
from kinema.config.settings import fingerprint, from_dict
from kinema.diffusion.process import Network, build_process
from kinema.generation.check import check_memory, check_request, frames_for_seconds
from kinema.generation.clip import Clip
from kinema.generation.config import GenerateRequest, PipelineConfig
from kinema.generation.memory import MemoryEstimate, estimate_memory
from kinema.generation.noise import initial_noise
from kinema.generation.parts import DTYPES, Parts, Source, parameter_count
from kinema.models.build import build_text_encoder
from kinema.models.transformer import ClipShape

OnStep = Callable[[int], None]
"""Called after every sampling step with the number of videos that it moved on."""

IMAGE_FPS = 120.0
"""What Open-Sora 1.2 tells the model as the frame rate of a single image."""


class Pipeline:
    """Text encoder, transformer, autoencoder and sampler of one checkpoint.

    `from_pretrained` only reads the checkpoint's description; weights are read when the first
    request has been checked. A pipeline is not safe to use from several threads at once.
    """

    def __init__(
        self,
        config: PipelineConfig,
        parts: Parts | Source,
        *,
        device: str | torch.device | None = None,
        dtype: str = "fp32",
    ) -> None:
        """
        Args:
            parts: the networks (training hands in its own), or where they are.
            device: default: the first GPU, or the CPU.
            dtype: arithmetic of the transformer, "fp32", "bf16" or "fp16"; the weights and the
                autoencoder stay float32.
        """
        if dtype not in DTYPES:
            raise KinemaError(f"dtype is {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
        self.config = config
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        self._parts = parts
        self._process = build_process(config.diffusion)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        vae: str | os.PathLike[str] | None = None,
        ema: bool = True,
        device: str | torch.device | None = None,
        dtype: str = "fp32",
    ) -> Self:
        """The pipeline of a checkpoint folder, or of a run folder's newest checkpoint.

        Args:
            vae: the autoencoder's weights, in place of those the checkpoint names.
            ema: use the averaged weights.

        Raises:
            KinemaError: the checkpoint or the autoencoder is missing, torn or of another kind.
        """
        source = Source.find(Path(path), vae=Path(vae) if vae else None, ema=ema)
        return cls(source.config, source, device=device, dtype=dtype)

    def request(
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
    ) -> GenerateRequest:
        """A request with the checkpoint's own defaults for whatever is not given, checked.

        Size and length default to the shape seen most in training.

        Raises:
            KinemaError: a value that cannot be met, with the nearest that can.
        """
        if seconds is not None and num_frames is not None:
            raise KinemaError("give seconds or num_frames, not both", where="length")
        if (width is None) != (height is None):
            raise KinemaError("give width and height together", where="size")
        usual = self.config.buckets[0] if self.config.buckets else None
        fps = self.config.fps if fps is None else fps
        if seconds is not None:
            num_frames = frames_for_seconds(seconds, fps, self.config.vae.config)
        if usual is not None:
            num_frames = usual.num_frames if num_frames is None else num_frames
            width, height = (usual.width, usual.height) if width is None else (width, height)
        if width is None or height is None or num_frames is None:
            raise KinemaError(
                "the checkpoint does not say which sizes it was trained on",
                hint="give size and number of frames",
            )
        defaults = self.config.diffusion
        steps = num_sampling_steps
        values = {
            "prompt": prompt,
            "width": width,
            "height": height,
            "num_frames": num_frames,
            "fps": fps,
            "seed": seed,
            "sample": sample,
            "num_sampling_steps": defaults.num_sampling_steps if steps is None else steps,
            "cfg_scale": defaults.cfg_scale if cfg_scale is None else cfg_scale,
        }
        request = from_dict(GenerateRequest, values, where="request")
        check_request(request, self.config)
        return request

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
        """Make one video (or image: one frame); arguments as for `request`.

        The same arguments give the same video.
        """
        request = self.request(
            prompt,
            seconds=seconds,
            num_frames=num_frames,
            width=width,
            height=height,
            fps=fps,
            seed=seed,
            sample=sample,
            num_sampling_steps=num_sampling_steps,
            cfg_scale=cfg_scale,
        )
        return next(self.generate_all([request]))

    def generate_all(
        self,
        requests: Sequence[GenerateRequest],
        *,
        batch_size: int = 1,
        on_step: OnStep | None = None,
    ) -> Iterator[Clip]:
        """Make a clip for each request, in order, each as soon as its batch is done.

        All requests are checked before weights are read. Requests next to each other that differ
        only in prompt, seed and sample share a batch; what comes out does not depend on that.

        Raises:
            KinemaError: a request that cannot be met, or too little memory.
        """
        batches = self.check(requests, batch_size=batch_size)
        parts = self.load()
        for batch in batches:
            yield from self._make(parts, batch, on_step)

    def check(
        self, requests: Sequence[GenerateRequest], *, batch_size: int = 1
    ) -> list[list[GenerateRequest]]:
        """The batches that `generate_all` would make of the requests, if all of them can be met.

        Raises:
            KinemaError: a request that cannot be met, or too little memory.
        """
        batches = list(_batches(requests, batch_size))
        for batch in batches:
            check_request(batch[0], self.config)
            check_memory(self.memory(batch[0], len(batch)), self.free_memory(), str(self.device))
        return batches

    def lost_words(self, prompt: str) -> str:
        """The end of a prompt that the text encoder has no room for; empty if all of it fits."""
        return build_text_encoder(self.config.text.config).lost(prompt)

    def load(self) -> Parts:
        """The networks, read now if they were not yet."""
        if isinstance(self._parts, Source):
            self._parts = self._parts.load(self.device)
        return self._parts

    def memory(self, request: GenerateRequest, batch: int) -> MemoryEstimate:
        """What a batch of such requests needs, weights that are not loaded yet included."""
        weights = parameter_count(self.config) * 4 if isinstance(self._parts, Source) else 0
        return estimate_memory(
            request, self.config, batch=batch, weight_bytes=weights, dtype=self.dtype
        )

    def free_memory(self) -> int:
        """Bytes that are free on the device."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return int(psutil.virtual_memory().available)

    def latents(
        self, requests: Sequence[GenerateRequest], *, on_step: OnStep | None = None
    ) -> Tensor:
        """Sampled latents, normalised, float32 `[B, C, T, H, W]`, of requests of one shape."""
        return self._sample(self.load(), requests, on_step, {})

    @torch.no_grad()
    def _make(
        self, parts: Parts, batch: Sequence[GenerateRequest], on_step: OnStep | None
    ) -> list[Clip]:
        seconds: dict[str, float] = {}
        z = self._sample(parts, batch, on_step, seconds)
        with _timed(seconds, "decode", self.device):
            # One by one: decoding needs the most memory, and a batch would not make it faster.
            frames = [_to_bytes(parts.vae.decode(one[None], batch[0].num_frames)[0]) for one in z]
        record = {
            "pipeline": parts.identity,
            "config_sha256": fingerprint(self.config),
            "dtype": self.dtype,
            "device": _device_name(self.device),
            "versions": {
                "kinema": kinema.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "batch_size": len(batch),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        return [Clip(f, request, record) for f, request in zip(frames, batch, strict=True)]

    @torch.no_grad()
    def _sample(
        self,
        parts: Parts,
        batch: Sequence[GenerateRequest],
        on_step: OnStep | None,
        seconds: dict[str, float],
    ) -> Tensor:
        first, count = batch[0], len(batch)
        size = self.config.vae.config.latent_size(first.num_frames, first.height, first.width)
        shape = (self.config.model.in_channels, *size)
        noise = torch.stack([initial_noise(r.seed, r.sample, shape) for r in batch])

        with _timed(seconds, "text", self.device):
            text = parts.text.encode([r.prompt for r in batch])
        height = torch.full((count,), float(first.height), device=self.device)
        width = torch.full((count,), float(first.width), device=self.device)
        fps = first.fps if first.num_frames > 1 else IMAGE_FPS
        velocity = self._velocity(
            parts,
            text.y.to(self.device),
            text.mask,
            ClipShape(
                fps=torch.full((count,), fps, device=self.device),
                height=height,
                width=width,
                num_frames=torch.full((count,), float(first.num_frames), device=self.device),
            ),
            first.cfg_scale,
        )
        timesteps = self._process.sampling_timesteps(
            first.num_sampling_steps,
            latent_frames=torch.full((count,), float(size[0]), device=self.device),
            height=height,
            width=width,
        )
        with _timed(seconds, "sample", self.device):
            return self._process.sample(
                velocity,
                noise.to(self.device),
                timesteps,
                on_step=None if on_step is None else lambda _: on_step(count),
            )

    def _velocity(
        self,
        parts: Parts,
        y: Tensor,
        mask: Tensor | None,
        shape: ClipShape,
        scale: float,
    ) -> Network:
        """The transformer with text, sizes and guidance bound."""
        model = parts.model
        dtype = DTYPES[self.dtype]
        guide = scale != 1.0
        if guide:
            # One forward of twice the batch. The second half keeps the captions' lengths, as the
            # released weights were sampled with.
            y = torch.cat([y, model.null_text(len(y))[:, :, : y.shape[2]].to(y)])
            mask = None if mask is None else mask.repeat(2, 1)
            shape = shape.repeat(2)

        def velocity(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
            if guide:
                x, t = torch.cat([x, x]), torch.cat([t, t])
                x_mask = None if x_mask is None else torch.cat([x_mask, x_mask])
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                out = model.predict(x, t, y, mask=mask, x_mask=x_mask, shape=shape)
            if not guide:
                return out
            cond, uncond = out.chunk(2)
            return self._process.guided(cond, uncond, scale)

        return velocity


def _batches(requests: Sequence[GenerateRequest], size: int) -> Iterator[list[GenerateRequest]]:
    if size < 1:
        raise KinemaError(f"batch size is {size}; it must be at least 1")
    batch: list[GenerateRequest] = []
    for request in requests:
        if batch and (len(batch) == size or _shape(batch[0]) != _shape(request)):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _shape(r: GenerateRequest) -> tuple[float, ...]:
    return (r.width, r.height, r.num_frames, r.fps, r.num_sampling_steps, r.cfg_scale)


def _to_bytes(video: Tensor) -> np.ndarray:
    """`[3, T, H, W]` in [-1, 1] to uint8 `[T, H, W, 3]`."""
    pixels = (video.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@contextmanager
def _timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
