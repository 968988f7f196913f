"""One segment of a batch, phase by phase: noise and text to latents, latents to frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinema.diffusion.process import Network, Process
from kinema.generation.captions import Caption, GuidedText
from kinema.generation.config import GenerateRequest
from kinema.generation.mask_strategy import FrameConditioning
from kinema.generation.noise import Shape, initial_noise, step_noise
from kinema.models.autoencoder import Autoencoder
from kinema.models.transformer import ClipShape, Transformer

OnStep = Callable[[int], None]
"""Called after every sampling step with the number of videos that it moved on."""

IMAGE_FPS = 120.0
"""What Open-Sora 1.1 and 1.2 tell the model as the frame rate of a single image."""


@torch.no_grad()
def sample(
    model: Transformer,
    process: Process,
    requests: Sequence[GenerateRequest],
    captions: Sequence[Caption],
    negative: Sequence[Caption | None],
    conditioning: Sequence[FrameConditioning | None],
    *,
    segment: int,
    shape: Shape,
    device: torch.device,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents of one segment of requests that differ in text, seed and references only.

    Args:
        captions: of this segment, one for each request.
        negative: what guidance leads each away from; None: the learned stand-in.
        conditioning: frames to keep, for the requests that keep any.
        shape: of one latent.

    Returns:
        Normalised, float32 `[B, C, T, H, W]`, on `device`.
    """
    first, count = requests[0], len(requests)
    noise = [initial_noise(r.seed, r.sample, shape, segment) for r in requests]
    z, mask = _start(noise, conditioning)
    text = GuidedText.of(model, captions, negative, first.cfg_scale, device)
    timesteps = process.sampling_timesteps(
        first.num_sampling_steps,
        latent_frames=torch.full((count,), float(shape[1]), device=device),
        height=torch.full((count,), float(first.height), device=device),
        width=torch.full((count,), float(first.width), device=device),
    )
    return process.sample(
        guided_network(model, process, text, clip_shape(requests, device), first.cfg_scale),
        z.to(device),
        timesteps,
        mask=None if mask is None else mask.to(device),
        noise=step_noise(requests, segment, shape, device),
        on_step=None if on_step is None else lambda _: on_step(count),
    )


def clip_shape(requests: Sequence[GenerateRequest], device: torch.device) -> ClipShape:
    """What the model is told about each clip."""

    def row(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return ClipShape(
        fps=row([r.fps if r.num_frames > 1 else IMAGE_FPS for r in requests]),
        height=row([float(r.height) for r in requests]),
        width=row([float(r.width) for r in requests]),
        num_frames=row([float(r.num_frames) for r in requests]),
    )


def guided_network(
    model: Transformer, process: Process, text: GuidedText, shape: ClipShape, scale: float
) -> Network:
    """The transformer with text, sizes and guidance bound.

    Guidance is one forward of twice the batch. What depends on the text alone is worked out here,
    once for all steps.
    """
    prepared: Any = model.prepare_text(text.y, text.mask)
    shape = shape.repeat(text.halves)

    def network(x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        if text.halves == 2:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            x_mask = None if x_mask is None else torch.cat([x_mask, x_mask])
        out = model.predict(x, t, prepared, mask=text.mask, x_mask=x_mask, shape=shape)
        if text.halves == 1:
            return out
        cond, uncond = out.chunk(2)
        return process.guided(cond, uncond, scale)

    return network


@torch.no_grad()
def decode(vae: Autoencoder, z: Tensor, num_frames: int, device: torch.device) -> Tensor:
    """The video of one latent `[C, T, H, W]`: `[3, num_frames, H, W]`, about in [-1, 1].

    One at a time: decoding needs the most memory, and a batch would not make it faster.
    """
    return vae.decode(z[None].to(device), num_frames)[0]


@torch.no_grad()
def encode(vae: Autoencoder, video: Tensor, device: torch.device) -> Tensor:
    """Latent `[C, T, H, W]`, float32 on the CPU, of a video `[3, T, H, W]` in [-1, 1]: the
    posterior's mean, so that the same reference always means the same."""
    return vae.encode(video[None].to(device))[0].float().cpu()


def to_bytes(video: Tensor) -> np.ndarray:
    """`[3, T, H, W]` in [-1, 1] to uint8 `[T, H, W, 3]`; frame by frame, which saves memory."""
    frames = np.empty((*video.shape[1:], 3), dtype=np.uint8)
    for number, frame in enumerate(video.unbind(1)):
        pixels = (frame.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
        frames[number] = pixels.permute(1, 2, 0).cpu().numpy()
    return frames


def _start(
    noise: Sequence[Tensor], conditioning: Sequence[FrameConditioning | None]
) -> tuple[Tensor, Tensor | None]:
    """What sampling starts from: noise, and the given latents where the mask is below 1."""
    if all(c is None for c in conditioning):
        return torch.stack(list(noise)), None
    rows, masks = [], []
    for z, given in zip(noise, conditioning, strict=True):
        # A mask of ones generates every frame, as no mask does.
        mask = torch.ones(z.shape[1]) if given is None else given.mask
        if given is not None:
            z = torch.where(mask[None, :, None, None] < 1, given.latents, z)
        rows.append(z)
        masks.append(mask)
    return torch.stack(rows), torch.stack(masks)
