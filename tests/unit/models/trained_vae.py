"""Small autoencoders that were trained for a moment on the procedural world."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kinema.data.world import sample_scenes
from kinema.data.world_render import render
from kinema.models.config import ImageVAEConfig, VAE2DConfig, VAETemporalConfig, VideoVAEConfig
from kinema.models.image_vae import ImageVAE
from kinema.models.vae import VideoVAE
from kinema.models.vae_init import start_as_block_means

SPACE = VAE2DConfig(block_out_channels=(8, 16, 32), layers_per_block=1, norm_num_groups=1)
STEPS, LR = 10, 3e-5


@cache
def world_clips() -> Tensor:
    """Six clips of 17 frames, `[6, 3, 17, 64, 64]` in [-1, 1]."""
    clips = torch.stack([torch.from_numpy(render(s)[:17]) for s in sample_scenes(seed=5, count=6)])
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@cache
def trained_image_vae() -> ImageVAE:
    """On single frames; stride 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = ImageVAE(ImageVAEConfig(vae_2d=SPACE, scaling_factor=1.0))
        start_as_block_means(vae)
    _train(vae, frames=1)
    return vae.eval().requires_grad_(False)


@cache
def trained_video_vae() -> VideoVAE:
    """On pieces of five frames; strides 4 and 4, chunks of 17 frames."""
    time = VAETemporalConfig(
        filters=8,
        channel_multipliers=(1, 1, 2),
        temporal_downsample=(True, True),
        num_res_blocks=1,
        num_groups=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = VideoVAE(VideoVAEConfig(vae_2d=SPACE, vae_temporal=time, spatial_scaling=1.0))
        start_as_block_means(vae)
    _train(vae, frames=5)
    return vae.eval().requires_grad_(False)


def _train(vae: ImageVAE | VideoVAE, *, frames: int) -> None:
    optimizer = torch.optim.Adam(vae.parameters(), lr=LR)
    pieces = world_clips()[:, :, :15].unflatten(2, (-1, frames)).transpose(1, 2).flatten(0, 1)
    count = max(1, 4 // frames)
    for step in range(STEPS):
        video = pieces[torch.arange(step * count, (step + 1) * count) * 7 % len(pieces)]
        z = vae.encode(video, noise=torch.Generator().manual_seed(step))
        loss = (vae.decode(z, frames) - video).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def psnr(got: Tensor, want: Tensor) -> float:
    """Peak signal to noise in dB, for values in [-1, 1]."""
    error = (got.float() - want.float()).double().square().mean()
    return float(10 * torch.log10(4 / error)) if error > 0 else float("inf")
